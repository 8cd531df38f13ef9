"""The waiting queue: by priority, then by arrival."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from asyncpipe_coordinator.core.sequences import Sequence


class WaitingQueue:
    """Its bound is its user's business: a preempted sequence must always find room."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self.num_tokens = 0  # that would have to be computed for all of them

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def push(self, sequence: Sequence) -> None:
        bisect.insort(self._sequences, sequence, key=_rank)
        self.num_tokens += sequence.length

    def first(self) -> Sequence:
        return self._sequences[0]

    def pop(self) -> Sequence:
        sequence = self._sequences.pop(0)
        self.num_tokens -= sequence.length
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
        self.num_tokens -= sequence.length

    def clear(self) -> None:
        self._sequences.clear()
        self.num_tokens = 0


def _rank(sequence: Sequence) -> tuple[int, int]:
    return (-sequence.request.priority, sequence.arrival)
