"""Whether stages that read the same memory had better take turns: with all sequences in one micro-batch.

Stages that decode a few sequences mostly read weights, each all of its own for every micro-batch. Where they share what their
memory can deliver, two micro-batches have everything read twice, and neither stage is as quick as it is alone; where they
compute more than they read, the second one costs nothing and keeps both at work. Which it is depends on kernels, memory and the
number of sequences, so both ways are tried. All sequences are in the pipeline either way: more tokens a second are those of the
shorter round trip (Little's law).
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

NUM_RECENT = 16  # round trips whose median counts
ENOUGH = 8  # of them to go by
STALE = 1024  # round trips of one way, after which the other is measured again
MOST_TRIED_S = 0.1  # a round trip, to try the other way at all: longer steps have more to lose by it
WORTH_TURNS = 0.05  # round trips must be so much shorter: several micro-batches leave room for newcomers


@dataclass(slots=True)
class _Way:
    """Round trips of one way, as multiples of what one step of all sequences should take on all stages: so that numbers of
    sequences that are nearly alike can be compared."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    num_seen: int = 0

    @property
    def is_measured(self) -> bool:
        return len(self.recent) >= ENOUGH

    @property
    def typical(self) -> float:
        return statistics.median(self.recent)


@dataclass(slots=True)
class Turns:
    """By the number of sequences, to a power of two."""

    _in_turns: dict[int, _Way] = field(default_factory=dict)
    _at_once: dict[int, _Way] = field(default_factory=dict)

    def observe(self, *, in_turns: bool, num_sequences: int, round_trip_s: float, steps_s: float) -> None:
        """Of a step, while `num_sequences` decode in it and beside it. `steps_s` is what all stages should take, one after the
        other, for a step of them all."""
        ways, others = (self._in_turns, self._at_once) if in_turns else (self._at_once, self._in_turns)
        way = ways.setdefault(num_sequences.bit_length(), _Way())
        way.recent.append(round_trip_s / steps_s)
        way.num_seen += 1
        if way.num_seen % STALE == 0:
            others.pop(num_sequences.bit_length(), None)

    def pay(self, num_sequences: int, *, steps_s: float) -> bool:
        """Whether stages shall take turns with so many sequences: because that is quicker, or to see whether it is."""
        at_once = self._at_once.get(num_sequences.bit_length())
        in_turns = self._in_turns.get(num_sequences.bit_length())
        if at_once is None or not at_once.is_measured:
            return False
        if in_turns is None or not in_turns.is_measured:
            return at_once.typical * steps_s < MOST_TRIED_S
        return in_turns.typical < at_once.typical * (1 - WORTH_TURNS)
