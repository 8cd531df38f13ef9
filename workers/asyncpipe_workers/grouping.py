"""Which steps that wait at a stage may be computed in one pass over its weights."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from asyncpipe.wire.messages import Step
from asyncpipe_workers.output import ArrivedStep

MAX_GROUP = 64
LINGER_SHARE = 0.05  # of the last pass: so long a pass is put off for steps that will be here at once
MAX_LINGER_S = 0.1
POLL_S = 0.0005


Members = Callable[[int], Iterable[int]]
"""The sequences of a micro-batch."""


class Grouping(Protocol):
    def choose(self, arrived: Callable[[], Sequence[ArrivedStep]]) -> int: ...

    def done(self, micro_batches: Iterable[int], seconds: float) -> None:
        """A pass over the weights for these has taken so long."""
        ...


class OneByOne:
    """For weights that stay: waiting for others would gain nothing."""

    def choose(self, arrived: Callable[[], Sequence[ArrivedStep]]) -> int:
        return 1

    def done(self, micro_batches: Iterable[int], seconds: float) -> None:
        """Nothing depends on it."""


class AllThatWait:
    """For weights that are brought here for each pass. With `lingers`, the micro-batches of the last two passes are awaited a
    little: they come back at once where this stage is the whole pipeline."""

    def __init__(self, members: Members, *, lingers: bool) -> None:
        self._members = members
        self._lingers = lingers
        self._recent: deque[frozenset[int]] = deque(maxlen=2)
        self._pass_s = 0.0

    def choose(self, arrived: Callable[[], Sequence[ArrivedStep]]) -> int:
        waiting = arrived()
        if self._lingers:
            awaited = frozenset().union(*self._recent)
            until_s = time.monotonic() + min(self._pass_s * LINGER_SHARE, MAX_LINGER_S)
            while not awaited <= {arrived.step.micro_batch for arrived in waiting} and time.monotonic() < until_s:
                time.sleep(POLL_S)
                waiting = arrived()
        return compatible([arrived.step for arrived in waiting], self._members)

    def done(self, micro_batches: Iterable[int], seconds: float) -> None:
        self._recent.append(frozenset(micro_batches))
        self._pass_s = seconds


def compatible(steps: Sequence[Step], members: Members) -> int:
    """How many of the first ones touch different sequences, and so may be computed side by side, layer by layer."""
    touched: set[int] = set()
    for count, step in enumerate(steps[:MAX_GROUP]):
        delta = step.delta
        mine = {*delta.left, *delta.parted, *delta.adopted, *(chunk.sequence for chunk in delta.chunks)}
        mine |= set(members(step.micro_batch))
        if mine & touched:
            return count
        touched |= mine
    return min(len(steps), MAX_GROUP)
