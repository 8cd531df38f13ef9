"""Steady decode on a CPU without Python: a step that only continues sequences is replayed from a tape.

Between two large products nothing is left in the caches of what Python and torch need for the next call, so that a call takes
tens of microseconds: a quarter of a step of a small batch. A tape holds the calls of a step's kernels, which one compiled loop
makes again; what differs from step to step is copied to where they find it. Shapes: B rows, D hidden.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from asyncpipe_workers.layout import Frequencies, Rotation, Seen, StepLayout
from asyncpipe_workers.memory.kv import ArenaKV
from asyncpipe_workers.models.units import Layer
from asyncpipe_workers.sweep import Result, Sweep, Work
from asyncpipe_workers.tape import OtherCalls, Tape, TapeMemory, recording

log = logging.getLogger(__name__)

MAX_ROWS = 32  # a larger batch computes for much longer than it is called
SWITCH = "ASYNCPIPE_DECODE_TAPES"  # 0 in the environment: never


class _Recorded(NamedTuple):
    """A step's tape, and where its numbers come from and go to."""

    seen: Mapping[int | None, Seen]
    rotations: Mapping[Frequencies, Rotation]
    hidden_BD: torch.Tensor
    output_BD: torch.Tensor
    tape: Tape  # which has all memory in between
    replay: Callable[[], None]

    def bring(self, hidden_BD: torch.Tensor, layout: StepLayout) -> bool:
        """What a step begins with, to where the tape's kernels find it. False if it does not fit there."""
        seen = {window: Seen.of(layout.rows, window) for window in self.seen}
        if any(own.longest > self.seen[window].longest for window, own in seen.items()):
            return False
        self.hidden_BD.copy_(hidden_BD)
        for window, own in seen.items():
            self.seen[window].sequences_B3.copy_(own.sequences_B3)
        for rope, rotation in self.rotations.items():
            for number, own_number in zip(rotation, rope.rotation(layout, hidden_BD.dtype), strict=True):
                number.copy_(own_number)
        return True


class DecodeTapes:
    """Of the layers of a stage whose weights, keys and values stay where they are."""

    def __init__(self, layers: Sequence[Layer], cache: ArenaKV) -> None:
        self._layers = layers
        self._cache = cache
        self._memory = TapeMemory()
        self._tapes: dict[tuple[int, int], _Recorded] = {}  # by the numbers of rows and of threads
        self._ropes: set[Frequencies] = set()  # that layers have asked for, and windows
        self._windows: set[int | None] = set()
        self._most_rows = MAX_ROWS

    def run(self, hidden_BD: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        """What the layers make of it, to be used before the next step."""
        if not self._windows:  # the first step, from which the next one knows what to prepare
            return self._computed(hidden_BD, layout)
        recorded = self._tapes.get((len(layout.rows), torch.get_num_threads()))
        if recorded is None or not recorded.bring(hidden_BD, layout):
            return self._record(hidden_BD, layout)
        recorded.replay()
        return recorded.output_BD

    def is_for(self, work: Work) -> bool:
        return len(work.batches) == 1 and work.only_continues(self._most_rows)

    def _computed(self, hidden_BD: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        for layer in self._layers:
            hidden_BD = layer(hidden_BD, layout, self._cache)
        self._ropes, self._windows = set(layout.rotations), set(layout.seen)
        if not self._windows:  # attention is torch's
            self._most_rows = 0
        return hidden_BD

    def _record(self, hidden_BD: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        """While it is computed. Where there are other calls than of compiled kernels, so many rows never are again."""
        from asyncpipe_workers.compiled.chain import Chain

        for rope in self._ropes:
            rope.rotation(layout, hidden_BD.dtype)
        for window in self._windows:
            layout.seen[window] = Seen.of(layout.rows, window)
        tape, others, num_bytes = Tape(self._memory), OtherCalls(), self._memory.num_bytes
        kept_BD = output_BD = hidden_BD.clone()
        with recording(tape), others:
            for layer in self._layers:
                self._memory.begin_part()
                output_BD = layer(output_BD, layout, self._cache)
        if self._memory.num_bytes > num_bytes or others.found:
            self._tapes.clear()  # else they would keep what they had before
        if others.found:
            self._most_rows = len(layout.rows) - 1
            what = min(others.found)
            log.info("decode steps of more than %d rows are computed call by call: %s is not compiled", self._most_rows, what)
        else:
            replay = Chain(tape.calls)
            key = len(layout.rows), torch.get_num_threads()
            self._tapes[key] = _Recorded(layout.seen, layout.rotations, kept_BD, output_BD, tape, replay)
        return output_BD


class TapedSweep:
    """A sweep whose layers are replayed where a step only continues sequences."""

    def __init__(self, sweep: Sweep, tapes: DecodeTapes) -> None:
        self._sweep = sweep
        self._tapes = tapes

    def run(self, works: Sequence[Work]) -> Iterator[Result]:
        if len(works) == 1 and self._tapes.is_for(works[0]):
            return self._sweep.run_step(works[0], self._tapes.run)
        return self._sweep.run(works)


def tapes_are_wanted() -> bool:
    with contextlib.suppress(ImportError):
        from asyncpipe_workers.compiled import chain

        return bool(chain) and os.environ.get(SWITCH, "1") != "0"
    return False
