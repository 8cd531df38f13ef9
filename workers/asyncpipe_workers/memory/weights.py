"""A stage's weights, unit by unit: all of them on the device for good, or streamed from where they rest.

Streaming: a ring of memory on the device holds the unit that is computed and the next ones, which are read, copied and unpacked
by other threads meanwhile, in the order of the units and over again. With a step's last unit comes the next step's first.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from asyncpipe.errors import AsyncPipeError, Invalid, Timeout
from asyncpipe_workers.memory.disk import CHUNK_BYTES, DiskFiles, aligned_down, aligned_up, new_buffer
from asyncpipe_workers.memory.ring import Region, Ring
from asyncpipe_workers.memory.stored import Extent, StoredTable, StoredTensor
from asyncpipe_workers.memory.streams import Mark, Streams
from asyncpipe_workers.memory.transfers import TRANSFER_TIMEOUT_S, Cargo, TransferLog
from asyncpipe_workers.models.units import Unit
from asyncpipe_workers.models.weights import (
    Linear,
    Projection,
    Resident,
    Rows,
    Table,
    Wanted,
    joined,
    linear_of_parts,
    transposed_of_parts,
)

ALIGN_BYTES = 64  # of tensors in the ring
MERGE_GAP_BYTES = 256 << 10  # of one file, to read over rather than to begin again
CLOSE_TIMEOUT_S = 10.0
UNITS_AHEAD = 3  # that fit into the ring, the one in use among them


class WeightStore(Protocol):
    """`acquire` units in their order, over and over; each is good until its `release`."""

    buffer_bytes: int

    def acquire(self, index: int) -> Any:
        """The block of the unit. Raises what went wrong in reading it, Timeout when nothing comes."""
        ...

    def release(self, index: int) -> None: ...

    def close(self) -> None: ...


class ResidentWeights:
    """All on the device, in the dtype to compute in."""

    buffer_bytes = 0

    def __init__(self, units: Iterable[Unit[Any]], weights: Resident) -> None:
        self._blocks = [unit.build(weights) for unit in units]

    def acquire(self, index: int) -> Any:
        return self._blocks[index]

    def release(self, index: int) -> None:
        """It stays."""

    def close(self) -> None:
        """Nothing to stop."""


class _Key(NamedTuple):
    name: str
    first: int
    last: int


@dataclass(slots=True)
class _Piece:
    """Rows of a tensor that a unit wants, and where they will be in the unit's region."""

    wanted: Wanted
    stored: StoredTensor
    host_offset: int | None = None  # of a copy of its rows on the host; None: they are unpacked from where they are
    disk_offset: int = 0
    numbers_offset: int | None = None  # of all its rows as numbers to compute with; None: the stored rows are those

    @property
    def bounds(self) -> tuple[int, int]:
        """Rows of the stored form: a vector is one."""
        return (self.wanted.first, self.wanted.last) if len(self.wanted.shape) > 1 else (0, 1)

    @property
    def disk(self) -> Extent:
        return self.stored.disk_rows(*self.bounds)

    @property
    def host(self) -> torch.Tensor:
        return self.stored.host_rows(*self.bounds)

    @property
    def device(self) -> torch.Tensor:
        return self.stored.device_rows(*self.bounds)


@dataclass(slots=True)
class _Read:
    """Whole blocks of a file, to `offset` in the unit's region."""

    extent: Extent
    offset: int


@dataclass(slots=True)
class _Plan:
    """What is loaded for a unit, and where to in its region."""

    unit: Unit[Any]
    pieces: list[_Piece] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)
    num_bytes: int = 0

    @classmethod
    def make(cls, unit: Unit[Any], stored: dict[str, StoredTensor], *, dtype: torch.dtype, device: torch.device) -> _Plan:
        plan = cls(unit, [_Piece(w, stored[w.name]) for w in unit.wanted if not w.is_lookup])
        plan._place_reads()
        for piece in plan.pieces:
            needs_unpacking = piece.stored.form.codec is not None or piece.stored.form.dtype != dtype
            if needs_unpacking or piece.disk_offset % dtype.itemsize:
                num_rows = piece.bounds[1] - piece.bounds[0]
                piece.numbers_offset = plan._reserve(num_rows * piece.stored.form.row_len * dtype.itemsize)
            if piece.host.numel() and (piece.numbers_offset is None or device.type != "cpu"):
                piece.host_offset = plan._reserve(piece.host.numel())
        return plan

    def _reserve(self, num_bytes: int) -> int:
        offset = -(-self.num_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self.num_bytes = offset + num_bytes
        return offset

    def _place_reads(self) -> None:
        """Neighbours in a file are read together. Each piece keeps its offset within a block of the file."""
        on_disk = sorted((piece for piece in self.pieces if piece.disk.num_bytes), key=lambda piece: piece.disk)
        for piece in on_disk:
            file, start, num_bytes = piece.disk
            last = self.reads[-1] if self.reads else None
            if last is not None and last.extent.file == file and start - _end(last.extent) <= MERGE_GAP_BYTES:
                last.extent = Extent(file, last.extent.offset, aligned_up(start + num_bytes) - last.extent.offset)
            else:
                base = aligned_down(start)
                offset = aligned_up(self.num_bytes)
                last = _Read(Extent(file, base, aligned_up(start + num_bytes) - base), offset)
                self.reads.append(last)
            self.num_bytes = last.offset + last.extent.num_bytes
            piece.disk_offset = last.offset + start - last.extent.offset


def _end(extent: Extent) -> int:
    return extent.offset + extent.num_bytes


class _Loading(NamedTuple):
    unit: int
    region: Region
    built: Future[tuple[Any, Mark]]  # its block, and what computing with it comes after


class _InUse(NamedTuple):
    region: Region
    block: Any


class _Retired(NamedTuple):
    """A block, which may have memory of its own, lives until what comes after it on the device waits for `computed`."""

    region: Region
    block: Any
    computed: Mark


class StreamedWeights:
    """Use `acquire` and `release` from one thread."""

    def __init__(
        self,
        units: Sequence[Unit[Any]],
        stored: dict[str, StoredTensor],
        *,
        files: DiskFiles,
        pool: ThreadPoolExecutor,
        log: TransferLog,
        dtype: torch.dtype,
        device: torch.device,
        overlap: bool,
    ) -> None:
        self._stored = stored
        self._files = files
        self._pool = pool
        self._log = log
        self._dtype = dtype
        self._device = device
        self._overlap = overlap
        self._plans = [_Plan.make(unit, stored, dtype=dtype, device=device) for unit in units]
        self._blocks: dict[int, Any] = {}  # of units of which nothing moves
        self._moving = [index for index, plan in enumerate(self._plans) if plan.num_bytes]
        self.buffer_bytes = self._ring_bytes()
        self._ring = Ring(new_buffer(self.buffer_bytes, device))
        self._streams = Streams(device)
        self._in_use: dict[int, _InUse] = {}
        self._retired: deque[_Retired] = deque()
        self._loading: queue.Queue[_Loading | Exception] = queue.Queue()
        self._unpacking = ThreadPoolExecutor(1, thread_name_prefix="unpack")
        self._loader = threading.Thread(target=self._load_all, name="weights", daemon=True)
        if overlap and self._moving:
            self._loader.start()

    def acquire(self, index: int) -> Any:
        plan = self._plans[index]
        if not plan.num_bytes:
            if index not in self._blocks:
                self._blocks[index] = plan.unit.build(_View(self, plan, None))
            return self._blocks[index]
        loading = self._next() if self._overlap else self._begin(index)
        if loading.unit != index:
            raise Invalid(f"unit {index} is wanted, but unit {loading.unit} comes next")
        block, loaded = self._log.wait(Cargo.WEIGHTS, loading.built, f"{plan.unit.name}'s weights")
        self._in_use[index] = _InUse(loading.region, block)
        self._streams.compute_after(loaded)
        return block

    def release(self, index: int) -> None:
        used = self._in_use.pop(index, None)
        if used is not None:
            self._retired.append(_Retired(*used, self._streams.computed()))
            self._ring.free(used.region)

    def close(self) -> None:
        self._ring.close()
        if self._loader.is_alive():
            self._loader.join(timeout=CLOSE_TIMEOUT_S)
        self._unpacking.shutdown(cancel_futures=True)
        self._streams.join()  # memory of either may be used again at once
        self._retired.clear()

    def _ring_bytes(self) -> int:
        sizes = [aligned_up(self._plans[index].num_bytes) for index in self._moving]
        if not self._overlap or not sizes:
            return max(sizes, default=0)
        around = sizes * 3
        return max(sum(around[start : start + UNITS_AHEAD]) for start in range(len(sizes)))

    def _next(self) -> _Loading:
        try:
            with self._log.waiting(Cargo.WEIGHTS):
                loading = self._loading.get(timeout=TRANSFER_TIMEOUT_S)
        except queue.Empty:
            raise Timeout(f"no weights came within {TRANSFER_TIMEOUT_S:g} s") from None
        if isinstance(loading, Exception):
            raise loading
        return loading

    def _load_all(self) -> None:
        """The loading thread: always as far ahead as there is room."""
        try:
            for index in itertools.cycle(self._moving):
                self._loading.put(self._begin(index))
        except AsyncPipeError as error:
            self._loading.put(error)

    def _begin(self, index: int) -> _Loading:
        """Start to bring a unit into the ring; waits for room there."""
        plan = self._plans[index]
        region = self._ring.allocate(plan.num_bytes)
        while any(retired.region.overlaps(region) for retired in self._retired):
            self._streams.load_after(self._retired[0].computed)
            self._retired.popleft()
        reads = [task for read in plan.reads for task in self._read(read, region)]
        return _Loading(index, region, self._unpacking.submit(self._finish, plan, region, reads))

    def _read(self, read: _Read, region: Region) -> list[Future[None]]:
        file, memory = self._files[read.extent.file], self._ring.bytes_of(region)[read.offset :]
        return [
            self._pool.submit(
                self._read_chunk, file, read.extent.offset + done, memory[done : min(done + CHUNK_BYTES, read.extent.num_bytes)]
            )
            for done in range(0, read.extent.num_bytes, CHUNK_BYTES)
        ]

    def _read_chunk(self, file: Any, offset: int, target: torch.Tensor) -> None:
        with self._log.moving(Cargo.WEIGHTS, len(target)):
            self._streams.read(file, offset, target)

    @torch.inference_mode()
    def _finish(self, plan: _Plan, region: Region, reads: list[Future[None]]) -> tuple[Any, Mark]:
        """Copy what is on the host while the disk is read, unpack what is packed, and build the block."""
        memory = self._ring.bytes_of(region)
        with self._streams.loading():
            for piece in plan.pieces:
                if piece.host_offset is not None:
                    num_bytes = piece.host.numel()
                    with self._log.moving(Cargo.WEIGHTS, num_bytes):
                        target = memory[piece.host_offset : piece.host_offset + num_bytes]
                        target.copy_(piece.host.reshape(-1), non_blocking=True)
            for task in reads:
                task.result(timeout=TRANSFER_TIMEOUT_S)
            view = _View(self, plan, memory)
            view.unpack()
            block = plan.unit.build(view)  # which may join what has been loaded
            return block, self._streams.loaded()

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def table(self, name: str) -> Table:
        return StoredTable(self._stored[name], self._files, self._pool, dtype=self._dtype)


class _View:
    """The tensors of one unit, in the ring and where they stay on the device."""

    def __init__(self, store: StreamedWeights, plan: _Plan, memory: torch.Tensor | None) -> None:
        self._store = store
        self._memory = memory
        self._pieces = {_Key(p.wanted.name, p.wanted.first, p.wanted.last): p for p in plan.pieces}

    def unpack(self) -> None:
        for piece in self._pieces.values():
            if piece.numbers_offset is not None:
                row, numbers = 0, self._numbers(piece)
                for rows in self._stored_rows(piece):
                    piece.stored.form.unpack(rows, numbers[row : row + len(rows)])
                    row += len(rows)

    def vector(self, name: str, size: int) -> torch.Tensor:
        return self._parts(_Key(name, 0, size))[0].view(size)

    def rows(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> list[torch.Tensor]:
        return self._parts(_Key(name, first, last))

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        raise Invalid(f"{name} cannot be streamed")

    def linear(self, rows: Sequence[Rows], in_size: int, *, bias: bool) -> Projection:
        return linear_of_parts(self, rows, in_size, bias=bias)

    def transposed(self, name: str, in_size: int, out_size: int, *, bias: bool) -> Projection:
        return transposed_of_parts(self, name, in_size, out_size, bias=bias)

    def head(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> Projection:
        return Linear(joined(self._parts(_Key(name, first, last))), None)

    def table(self, name: str, num_rows: int, size: int) -> Table:
        return self._store.table(name)

    def _parts(self, key: _Key) -> list[torch.Tensor]:
        piece = self._pieces[key]
        if piece.numbers_offset is not None:
            return [self._numbers(piece)]
        return [rows.view(self._store.dtype) for rows in self._stored_rows(piece)]

    def _numbers(self, piece: _Piece) -> torch.Tensor:
        num_rows, row_len, dtype = piece.bounds[1] - piece.bounds[0], piece.stored.form.row_len, self._store.dtype
        return self._bytes(piece.numbers_offset or 0, num_rows * row_len * dtype.itemsize).view(dtype).view(num_rows, row_len)

    def _stored_rows(self, piece: _Piece) -> list[torch.Tensor]:
        """On the device, copied from the host, read from disk; those that there are."""
        row_bytes = piece.stored.form.row_bytes
        host = piece.host
        if piece.host_offset is not None:
            host = self._bytes(piece.host_offset, host.numel()).view(-1, row_bytes)
        num_bytes = piece.disk.num_bytes
        disk = self._bytes(piece.disk_offset, num_bytes).view(-1, row_bytes) if num_bytes else piece.host[:0]
        return [rows for rows in (piece.device, host, disk) if len(rows)]

    def _bytes(self, offset: int, num_bytes: int) -> torch.Tensor:
        assert self._memory is not None  # noqa: S101 - a unit without a region has nothing in it
        return self._memory[offset : offset + num_bytes]
