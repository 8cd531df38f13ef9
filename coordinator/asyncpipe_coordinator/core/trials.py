"""How many micro-batches are quickest for a few sequences on stages of one machine, by trial.

`tuning` computes it from what stages and links take, as if none of them depended on the others. On one machine they do. Stages
that decode a few sequences mostly read weights, all of them for every micro-batch: two that compute at the same time share what
the memory delivers, and are slower than one after the other with all sequences. And what an additional micro-batch is to hide,
event loops and messages, takes longer the busier the cores are.

Whatever their number, all sequences are in the pipeline: more tokens a second are those of shorter round trips (Little's law).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

NUM_RECENT = 16  # round trips whose median counts
ENOUGH = 8  # of them to go by
STALE = 1024  # round trips with other numbers, after which one is tried again
MOST_TRIED_S = 1.0  # a round trip, to try another number at all: longer steps have more to lose by it
WORTH_TRYING = 0.05  # round trips must be so much shorter than with the number that was computed


StepsSeconds: TypeAlias = Callable[[int], float]
"""What all stages should take for one step of so many sequences, as far as is known now."""


class _RoundTrip(NamedTuple):
    seconds: float
    num_sequences: int


@dataclass(slots=True)
class _RoundTrips:
    """With one number of micro-batches."""

    recent: deque[_RoundTrip] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    last: int = 0  # when one was seen, counted in round trips

    def typical(self, steps_s: StepsSeconds) -> float:
        """In multiples of what a step should take, so that numbers of sequences that are nearly alike can be compared: all by
        one measure, for that changes as more is measured."""
        return statistics.median(trip.seconds / steps_s(trip.num_sequences) for trip in self.recent)


@dataclass(slots=True)
class Trials:
    _seen: dict[tuple[int, int], _RoundTrips] = field(default_factory=dict)  # by sequences to a power of two, micro-batches
    _num_seen: int = 0
    _load: tuple[int, int] = (0, 0)  # sequences, and micro-batches of them
    _same_since_s: float = 0.0

    def observe(
        self,
        *,
        num_micro_batches: int,
        num_sequences: int,
        issued_at_s: float,
        at_s: float,
        num_steps: int = 1,
    ) -> None:
        """A step is back, or several that went round by themselves, while `num_sequences` decode in it and beside it: 0 while
        others do something else. What has waited for something else does not count."""
        load = num_sequences, num_micro_batches
        if load != self._load:
            self._load, self._same_since_s = load, at_s
        elif num_sequences > 1 and issued_at_s >= self._same_since_s:
            trips = self._seen.setdefault((num_sequences.bit_length(), num_micro_batches), _RoundTrips())
            if self._is_stale(trips):
                trips.recent.clear()
            self._num_seen += num_steps
            trips.last = self._num_seen
            trips.recent.extend([_RoundTrip((at_s - issued_at_s) / num_steps, num_sequences)] * num_steps)

    def best(self, candidates: Sequence[int], *, num_sequences: int, steps_s: StepsSeconds) -> int:
        """Of these numbers of micro-batches, each of which holds all sequences; the first is the one that was computed."""
        trips = {count: self._seen.get((num_sequences.bit_length(), count)) for count in candidates}
        typical = {count: seen.typical(steps_s) for count, seen in trips.items() if seen is not None and self._is_enough(seen)}
        computed = candidates[0]
        if computed not in typical:
            return computed
        unknown = [count for count in candidates if count not in typical]
        if unknown and typical[computed] * steps_s(num_sequences) < MOST_TRIED_S:
            return unknown[0]
        quickest = min(typical, key=lambda count: typical[count])
        return quickest if typical[quickest] < typical[computed] * (1 - WORTH_TRYING) else computed

    def _is_enough(self, trips: _RoundTrips) -> bool:
        return len(trips.recent) >= ENOUGH and not self._is_stale(trips)

    def _is_stale(self, trips: _RoundTrips) -> bool:
        return self._num_seen - trips.last >= STALE
