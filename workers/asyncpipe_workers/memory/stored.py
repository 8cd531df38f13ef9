"""Tensors as they rest: some rows on the device, some on the host, the rest on disk."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from asyncpipe.wire.messages import TierBytes
from asyncpipe_workers.memory.disk import (
    BLOCK_BYTES,
    DiskFiles,
    ScratchFile,
    aligned_down,
    aligned_up,
    new_buffer,
)
from asyncpipe_workers.memory.placement import Rows
from asyncpipe_workers.memory.source import TensorSource
from asyncpipe_workers.memory.stored_form import StoredForm

LOOKUP_TASK_ROWS = 64  # single rows that one task reads from disk


class Extent(NamedTuple):
    """A range of a file."""

    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Rows [0, d) on the device, [d, h) on the host, [h, n) on disk, each (rows, row_bytes) uint8."""

    form: StoredForm
    device: torch.Tensor
    host: torch.Tensor
    file: str  # where the rows on disk are ...
    offset: int  # ... and where row h begins

    @property
    def first_host(self) -> int:
        return len(self.device)

    @property
    def first_disk(self) -> int:
        return len(self.device) + len(self.host)

    def device_rows(self, first: int, last: int) -> torch.Tensor:
        return self.device[min(first, len(self.device)) : min(last, len(self.device))]

    def host_rows(self, first: int, last: int) -> torch.Tensor:
        return self.host[max(first - self.first_host, 0) : max(last - self.first_host, 0)]

    def disk_rows(self, first: int, last: int) -> Extent:
        """Of rows [first, last) those on disk; no bytes when there are none."""
        start, end = max(first, self.first_disk), max(last, self.first_disk)
        row_bytes = self.form.row_bytes
        return Extent(self.file, self.offset + (start - self.first_disk) * row_bytes, (end - start) * row_bytes)

    @property
    def tier_bytes(self) -> TierBytes:
        on_disk = self.disk_rows(0, self.form.num_rows).num_bytes
        return TierBytes(self.device.numel(), self.host.numel(), on_disk)


class Storage:
    """Brings tensors to their tiers. Disk rows stay in the checkpoint where they can; else they go to a file of this run."""

    def __init__(
        self, source: TensorSource, files: DiskFiles, *, device: torch.device, offload_dir: Path, pin_host: bool = False
    ) -> None:
        self._source = source
        self._files = files
        self._device = device
        self._offload_dir = offload_dir
        self._pin_host = pin_host and device.type == "cuda"
        self._scratch: ScratchFile | None = None
        self._scratch_end = 0

    def store(self, forms: Sequence[StoredForm], places: dict[str, Rows]) -> dict[str, StoredTensor]:
        """Raises Invalid when a file cannot be read, or there is no room on disk."""
        to_scratch = [form for form in forms if form.place is None]
        num_bytes = sum(aligned_up((form.num_rows - sum(places[form.name])) * form.row_bytes) for form in to_scratch)
        if num_bytes:
            self._scratch = ScratchFile(self._offload_dir, num_bytes, what="weights")
            self._files.add(self._scratch.name, self._scratch.reader)
        return {form.name: self._store(form, places[form.name]) for form in forms}

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.close()

    def _store(self, form: StoredForm, rows: Rows) -> StoredTensor:
        device = torch.empty(rows.device, form.row_bytes, dtype=torch.uint8, device=self._device)
        host = self._host_memory(rows.host, form.row_bytes)
        self._fill(form, 0, device)
        self._fill(form, rows.device, host)
        first_disk = rows.device + rows.host
        if form.place is not None:
            return StoredTensor(form, device, host, str(form.place.path), form.place.offset + first_disk * form.row_bytes)
        if first_disk == form.num_rows:
            return StoredTensor(form, device, host, "", 0)
        return StoredTensor(form, device, host, *self._spool(form, first_disk))

    def _host_memory(self, num_rows: int, row_bytes: int) -> torch.Tensor:
        if self._pin_host:
            return torch.empty(num_rows, row_bytes, dtype=torch.uint8, pin_memory=True)
        if not num_rows:
            return torch.empty(0, row_bytes, dtype=torch.uint8)
        return new_buffer(num_rows * row_bytes)[: num_rows * row_bytes].view(num_rows, row_bytes)

    def _fill(self, form: StoredForm, first: int, target: torch.Tensor) -> None:
        row = 0
        for chunk in self._source.chunks(form, first, first + len(target)):
            target[row : row + len(chunk)] = chunk
            row += len(chunk)

    def _spool(self, form: StoredForm, first: int) -> tuple[str, int]:
        assert self._scratch is not None  # noqa: S101 - made by `store` when anything goes there
        start = offset = self._scratch_end
        for chunk in self._source.chunks(form, first, form.num_rows):
            data = chunk.contiguous().numpy().reshape(-1).data
            self._scratch.write(offset, data)
            offset += len(data)
        self._scratch.flush()
        self._scratch_end = aligned_up(offset)
        return self._scratch.name, start


class StoredTable:
    """A matrix of which single rows are looked up on whichever tier they are."""

    def __init__(self, stored: StoredTensor, files: DiskFiles, pool: Executor, *, dtype: torch.dtype) -> None:
        self._stored = stored
        self._files = files
        self._pool = pool
        self._dtype = dtype

    def __call__(self, indices_T: torch.Tensor) -> torch.Tensor:
        stored, form = self._stored, self._stored.form
        unique_U, places_T = torch.unique(indices_T, return_inverse=True)
        rows_UB = torch.empty(len(unique_U), form.row_bytes, dtype=torch.uint8, device=stored.device.device)
        on_device = unique_U < stored.first_host
        on_disk = unique_U >= stored.first_disk
        on_host = ~on_device & ~on_disk
        if len(stored.device):
            rows_UB[on_device] = stored.device[unique_U[on_device]]
        if len(stored.host):
            rows_UB[on_host] = stored.host[(unique_U[on_host] - stored.first_host).cpu()].to(rows_UB.device)
        if bool(on_disk.any()):
            rows_UB[on_disk] = self._from_disk((unique_U[on_disk] - stored.first_disk).tolist()).to(rows_UB.device)
        numbers_UD = torch.empty(len(unique_U), form.row_len, dtype=self._dtype, device=rows_UB.device)
        form.unpack(rows_UB, numbers_UD)
        return numbers_UD[places_T]

    def _from_disk(self, rows: list[int]) -> torch.Tensor:
        found = torch.empty(len(rows), self._stored.form.row_bytes, dtype=torch.uint8)
        tasks = [
            self._pool.submit(self._read_rows, rows[first : first + LOOKUP_TASK_ROWS], found[first:])
            for first in range(0, len(rows), LOOKUP_TASK_ROWS)
        ]
        for task in tasks:
            task.result()
        return found

    @torch.inference_mode()
    def _read_rows(self, rows: list[int], target: torch.Tensor) -> None:
        file, row_bytes = self._files[self._stored.file], self._stored.form.row_bytes
        buffer = new_buffer(row_bytes + 2 * BLOCK_BYTES)
        for index, row in enumerate(rows):
            start = self._stored.offset + row * row_bytes
            base = aligned_down(start)
            file.read(base, buffer.numpy()[: aligned_up(start + row_bytes) - base].data)
            target[index] = buffer[start - base : start - base + row_bytes]
