"""Rows of bytes, one for each token of a sequence, on one memory tier.

Shapes: S slots, C capacity of a slot in tokens, B bytes of a token. There are `num_layers` x 2 tables: keys and values.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.memory.disk import ScratchFile, aligned_up
from asyncpipe_workers.memory.kv import MAP_NORESERVE, PAGE_BYTES


class Part(NamedTuple):
    """Keys (0) or values (1) of a layer."""

    layer: int
    which: int

    @property
    def number(self) -> int:
        return 2 * self.layer + self.which


class MemoryTokens:
    """In memory. On a CPU a slot is address space that gets memory as it is written; elsewhere all of it is allocated.

    Raises Invalid when there is not enough.
    """

    def __init__(self, *, num_layers: int, max_sequences: int, capacity: int, token_bytes: int, device: torch.device) -> None:
        granule = PAGE_BYTES // math.gcd(PAGE_BYTES, token_bytes)
        capacity = -(-capacity // granule) * granule  # so that a slot is whole pages
        self._slot_bytes = capacity * token_bytes
        self._maps: list[mmap.mmap] = []
        num_bytes = max_sequences * self._slot_bytes
        size_SCB = (max_sequences, capacity, token_bytes)
        self._tables = [self._new(num_bytes, device).view(size_SCB) for _ in range(2 * num_layers if capacity else 0)]

    def rows(self, part: Part, slot: int, start: int, end: int) -> torch.Tensor:
        """Tokens [start, end), (end - start, B) uint8, in place."""
        return self._tables[part.number][slot, start:end]

    def put(self, part: Part, slots_N: torch.Tensor, places_N: torch.Tensor, rows_NB: torch.Tensor) -> None:
        """One token of each of N sequences."""
        self._tables[part.number][slots_N, places_N] = rows_NB

    def release(self, slot: int) -> None:
        """Nobody will read what is there; the memory goes back."""
        for memory in self._maps:
            memory.madvise(mmap.MADV_DONTNEED, slot * self._slot_bytes, self._slot_bytes)

    def _new(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        try:
            if device.type != "cpu":
                return torch.empty(num_bytes, dtype=torch.uint8, device=device)
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        except (OSError, OverflowError, torch.OutOfMemoryError) as error:
            raise Invalid(
                f"cannot reserve {num_bytes} bytes for keys and values ({error}): use fewer sequences or a smaller --kv-memory"
            ) from None
        self._maps.append(memory)
        return torch.frombuffer(memory, dtype=torch.uint8)


class DiskTokens:
    """In a file without a name that grows as it is written."""

    def __init__(self, directory: Path, *, max_sequences: int, capacity: int, token_bytes: int) -> None:
        self._max_sequences = max_sequences
        self._token_bytes = token_bytes
        self._slot_bytes = aligned_up(capacity * token_bytes)
        self._file = ScratchFile(directory, 0, what="keys and values")

    def write(self, part: Part, slot: int, start: int, rows: torch.Tensor) -> None:
        """`rows` (n, B) uint8 in CPU memory."""
        self._file.write(self._offset(part, slot, start), rows.contiguous().numpy().reshape(-1).data)

    def read(self, part: Part, slot: int, start: int, target: torch.Tensor) -> None:
        """Fill `target`, (n, B) uint8, contiguous, in CPU memory, with tokens from `start` on."""
        self._file.read(self._offset(part, slot, start), target.numpy().reshape(-1).data)

    def gather(self, part: Part, slot: int, tokens: Sequence[int]) -> torch.Tensor:
        """Single tokens, (n, B)."""
        found = torch.empty(len(tokens), self._token_bytes, dtype=torch.uint8)
        for index, token in enumerate(tokens):
            self.read(part, slot, token, found[index : index + 1])
        return found

    def close(self) -> None:
        self._file.close()

    def _offset(self, part: Part, slot: int, token: int) -> int:
        return (part.number * self._max_sequences + slot) * self._slot_bytes + token * self._token_bytes
