"""Hidden states of batches between two units: on the device, or shared out over the tiers.

Rows of a batch have homes; they go home when a unit has been computed, and come back before the next one.
Shapes: T rows of a batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from asyncpipe.policy import Policy
from asyncpipe_workers.memory.disk import ScratchFile, aligned_up
from asyncpipe_workers.memory.shares import Apportionment, Counts
from asyncpipe_workers.memory.transfers import TRANSFER_TIMEOUT_S, Cargo, TransferLog


class Activations(Protocol):
    def put(self, key: Hashable, hidden_TD: torch.Tensor) -> None: ...

    def prefetch(self, key: Hashable) -> None:
        """It will be taken soon."""
        ...

    def take(self, key: Hashable) -> torch.Tensor:
        """What was put, once."""
        ...


class DeviceActivations:
    """They stay where they are."""

    def __init__(self) -> None:
        self._hidden: dict[Hashable, torch.Tensor] = {}

    def put(self, key: Hashable, hidden_TD: torch.Tensor) -> None:
        self._hidden[key] = hidden_TD

    def prefetch(self, key: Hashable) -> None:
        """Nothing has to come."""

    def take(self, key: Hashable) -> torch.Tensor:
        return self._hidden.pop(key)


@dataclass(slots=True)
class _Away:
    """A batch's rows at home. `place` is where in the file its rows on disk are."""

    counts: Counts
    shape: torch.Size
    device: torch.Tensor
    stored: Future[torch.Tensor]  # the rows on the host
    place: int = 0
    fetched: Future[torch.Tensor] | None = None


class TieredActivations:
    def __init__(
        self, policy: Policy, *, dtype: torch.dtype, device: torch.device, directory: Path, pool: Executor, log: TransferLog
    ) -> None:
        self._policy = policy
        self._dtype = dtype
        self._device = device
        self._pool = pool
        self._log = log
        self._split = Apportionment(policy.activations)
        self._away: dict[Hashable, _Away] = {}
        self._file = ScratchFile(directory, 0, what="activations") if policy.activations.disk else None
        self._places = _Places()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, key: Hashable, hidden_TD: torch.Tensor) -> None:
        counts = self._split.extend(Counts(), len(hidden_TD))
        row_bytes = hidden_TD.shape[1] * self._dtype.itemsize
        place = self._places.take(aligned_up(counts.disk * row_bytes))
        stays = hidden_TD[: counts.device].clone()
        stored = self._pool.submit(self._store, hidden_TD, counts, place)
        self._away[key] = _Away(counts, hidden_TD.shape, stays, stored, place)
        if not self._policy.overlap:
            self._log.wait(Cargo.ACTIVATIONS, stored, "storing activations")

    def prefetch(self, key: Hashable) -> None:
        away = self._away.get(key)
        if away is not None and away.fetched is None:
            away.fetched = self._pool.submit(self._fetch, away)

    def take(self, key: Hashable) -> torch.Tensor:
        self.prefetch(key)
        away = self._away.pop(key)
        assert away.fetched is not None  # noqa: S101 - just begun
        hidden_TD = self._log.wait(Cargo.ACTIVATIONS, away.fetched, "activations")
        self._split.remove(away.counts)
        self._places.give_back(away.place, aligned_up(away.counts.disk * away.shape[1] * self._dtype.itemsize))
        return hidden_TD

    @torch.inference_mode()
    def _store(self, hidden_TD: torch.Tensor, counts: Counts, place: int) -> torch.Tensor:
        """Returns the rows on the host."""
        away_TD = hidden_TD[counts.device :].to("cpu")
        with self._log.moving(Cargo.ACTIVATIONS, away_TD.nbytes):
            if self._file is not None and counts.disk:
                on_disk = away_TD[counts.host :].contiguous()
                self._file.write(place, on_disk.view(torch.uint8).numpy().reshape(-1).data)
            return away_TD[: counts.host].clone()

    @torch.inference_mode()
    def _fetch(self, away: _Away) -> torch.Tensor:
        host = away.stored.result(timeout=TRANSFER_TIMEOUT_S)
        counts = away.counts
        hidden_TD = torch.empty(away.shape, dtype=self._dtype, device=self._device)
        hidden_TD[: counts.device] = away.device
        with self._log.moving(Cargo.ACTIVATIONS, (counts.host + counts.disk) * away.shape[1] * self._dtype.itemsize):
            hidden_TD[counts.device : counts.device + counts.host] = host
            if self._file is not None and counts.disk:
                rows = torch.empty(counts.disk, away.shape[1], dtype=self._dtype)
                self._file.read(away.place, rows.view(torch.uint8).numpy().reshape(-1).data)
                hidden_TD[counts.device + counts.host :] = rows
        return hidden_TD


class _Places:
    """Ranges of a file, used again when they are given back."""

    def __init__(self) -> None:
        self._free: dict[int, list[int]] = {}  # by length
        self._end = 0

    def take(self, num_bytes: int) -> int:
        if free := self._free.get(num_bytes):
            return free.pop()
        self._end += num_bytes
        return self._end - num_bytes

    def give_back(self, place: int, num_bytes: int) -> None:
        self._free.setdefault(num_bytes, []).append(place)
