"""How many micro-batches, and how large parts of prompts: chosen from measured stage times and round trips.

With M micro-batches of b sequences, a stage that takes t(b), and an overhead o of links and coordinator, a round trip takes at
least the sum of the stages' times and o, and the slowest stage needs M t(b) for one step of each. So M b tokens come back in
max(M max t(b), sum t(b) + o) seconds. More micro-batches than fill the pipeline make each one smaller, when there are only so
many sequences, and a stage's time hardly depends on its batch: then they cost throughput. One stage whose steps are short does
without them: several steps at once share one overhead. Where several stages take several steps at once, each has the overhead
of its links only, which is what is measured then.

That supposes that no stage depends on another. Where they do, on one machine, it is what `trials` begin with.

Prompts that come while nobody decodes go through N stages in C parts, so that each stage begins with the first part while those
before it compute the next ones. That takes (C + N - 1) times as long as a part takes on the slowest stage, and a part has its
own time, that of reading the weights, beside that of its tokens.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncpipe.wire.messages import MAX_STEPS_AT_ONCE, StageTiming
from asyncpipe_coordinator.core.trials import Trials

FORGET = 0.97  # what a measurement weighs after the next one
WORTH = 0.005  # another micro-batch must promise so much more throughput
SLACK = 1.5  # overheads vary; plan for more than the mean
CLOCK_S = 1e-6  # what stages measure with
AT_ONCE_S = 0.04  # of steps without a turn through the coordinator, where whoever comes waits for them
ALONE_STEPS = 4  # at once where nobody waits for them: more save little, and keep a micro-batch from prompts that come
ALONE_S = 0.2  # that these may take: what is computed after a sequence's end is for nothing
EXTRA = 2  # micro-batches beyond those that fill the pipeline, while there are sequences to fill them
PARTS = (2048, 1024, 512, 256, 128, 64, 32)  # tokens of prompts in a step: kernels have tiles
PART_WEIGHT = 0.2  # of one more measurement of steps with parts of prompts
WORTH_PARTS = 0.05  # smaller parts must promise so much less time


@dataclass(slots=True)
class _Line:
    """Exponentially weighted least squares of y = a + c x."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.weight = self.weight * FORGET + 1.0
        self.x = self.x * FORGET + x
        self.y = self.y * FORGET + y
        self.xx = self.xx * FORGET + x * x
        self.xy = self.xy * FORGET + x * y

    def at(self, x: float) -> float:
        """The estimate at `x`, never falling with x, never below a tenth of the mean."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 0.25 else 0.0
        return max(mean_y + max(slope, 0.0) * (x - mean_x), mean_y / 10)


@dataclass(slots=True)
class _Mean:
    """Exponentially weighted, of rows and seconds; the first, of things that nobody had done before, does not count."""

    rows: float = 0.0
    seconds: float = 0.0
    count: int = 0

    def add(self, rows: float, seconds: float) -> None:
        weight = 1.0 if self.count < 2 else PART_WEIGHT
        self.rows += weight * (rows - self.rows)
        self.seconds += weight * (seconds - self.seconds)
        self.count += 1


@dataclass(slots=True)
class _StepTimes:
    """Of one stage's steps, those with parts of prompts by their size, to a power of two: small products are slower than large
    ones by more than any line says."""

    decode: _Mean = field(default_factory=_Mean)
    prefill: dict[int, _Mean] = field(default_factory=dict)

    def add(self, rows: int, seconds: float, *, has_prompts: bool) -> None:
        mean = self.prefill.setdefault(rows.bit_length(), _Mean()) if has_prompts else self.decode
        mean.add(rows, seconds)

    @property
    def is_measured(self) -> bool:
        return len(self._points) > 1

    @property
    def _points(self) -> list[tuple[float, float]]:
        return sorted((mean.rows, mean.seconds) for mean in (self.decode, *self.prefill.values()) if mean.count > 1)

    def at(self, rows: float) -> float:
        """Between the two measured numbers of rows that are next to it, or on the way on from the last two."""
        points = self._points
        place = min(max(bisect.bisect(points, (rows,)), 1), len(points) - 1)
        (low, low_s), (high, high_s) = points[place - 1 : place + 1]
        slope = max(high_s - low_s, 0.0) / (high - low) if high > low else 0.0
        return max(low_s + slope * (rows - low), CLOCK_S)


@dataclass(slots=True)
class Tuner:
    num_stages: int
    _stages: list[_Line] = field(default_factory=list)
    _parts: list[_StepTimes] = field(default_factory=list)
    _overhead: _Line = field(default_factory=_Line)
    _round_trip: _Line = field(default_factory=_Line)
    _trials: Trials = field(default_factory=Trials)

    def observe(
        self,
        *,
        num_rows: int,
        timings: Sequence[StageTiming],
        round_trip_s: float,
        num_steps: int = 1,
        has_prompts: bool = False,
        in_turns: bool = False,
    ) -> None:
        """One step, or several of so many rows at once: what the stages say, and the time from its issue to its tokens.
        `in_turns`: no other was to be in the pipeline meanwhile, which says little of what others would find."""
        if len(timings) != self.num_stages or not num_rows:
            return
        if not self._stages:
            self._stages = [_Line() for _ in timings]
            self._parts = [_StepTimes() for _ in timings]
        for line, times, timing in zip(self._stages, self._parts, timings, strict=True):
            step_s = timing.compute_us / 1e6 / num_steps
            if not in_turns or not line.weight:
                line.add(num_rows, step_s)
            times.add(num_rows, step_s, has_prompts=has_prompts)
        inside_s = sum(timing.queue_us + timing.compute_us for timing in timings) / 1e6
        num_rounds = num_steps if self.num_stages > 1 else 1
        self._overhead.add(0.0, max(round_trip_s - inside_s, 0.0) / num_rounds)
        self._round_trip.add(0.0, round_trip_s / num_rounds)

    def observe_decoding(
        self, *, num_micro_batches: int, num_sequences: int, issued_at_s: float, at_s: float, num_steps: int = 1
    ) -> None:
        """A step of one of the micro-batches in which all of the sequences are, or several at once; 0 sequences: some do
        something else."""
        if self._stages:
            self._trials.observe(
                num_micro_batches=num_micro_batches,
                num_sequences=num_sequences,
                issued_at_s=issued_at_s,
                at_s=at_s,
                num_steps=num_steps,
            )

    def _steps_s(self, num_rows: float) -> float:
        """Of all stages, one after the other."""
        return max(sum(line.at(num_rows) for line in self._stages), CLOCK_S)

    @property
    def overhead_s(self) -> float:
        return self._overhead.at(0.0) if self._stages else 0.0

    @property
    def round_trip_s(self) -> float:
        return self._round_trip.at(0.0) if self._stages else 0.0

    def steps_at_once(self, num_rows: int, *, holds_up: bool = True) -> int:
        """Of so many rows, without a turn through the coordinator between them; `holds_up`: whoever comes."""
        if not self._stages:
            return 1
        step_s = self._round_s(num_rows)
        count = int(AT_ONCE_S / step_s)
        if self.num_stages > 1 and not holds_up:
            count = max(count, min(ALONE_STEPS, int(ALONE_S / step_s)))
        return min(max(count, 1), MAX_STEPS_AT_ONCE)

    def are_short(self, num_steps: int, num_rows: int) -> bool:
        """So many steps at once, of so many rows: nobody minds if their tokens come together."""
        return num_steps > 1 and num_steps * self._round_s(num_rows) <= AT_ONCE_S

    def _round_s(self, num_rows: int) -> float:
        """A step of those that follow each other by themselves."""
        return self._steps_s(num_rows) + (self.overhead_s if self.num_stages > 1 else 0.0)

    def part(self, num_tokens: int, *, most: int) -> int:
        """Of so many tokens of prompts, those that a step takes, `most` at the most, so that all are through the stages
        soonest. As many as can be for one stage, and before both kinds of steps were measured."""
        chosen, best_s = min(num_tokens, most), math.inf
        if self.num_stages == 1 or not self._stages or not all(stage.is_measured for stage in self._parts):
            return chosen
        sizes = [chosen, *(size for size in PARTS if size < chosen)]
        for size in sizes:
            count, step_s = num_tokens / size, max(stage.at(size) for stage in self._parts)
            seconds = (count + self.num_stages - 1) * step_s + count / self.num_stages * self.overhead_s
            if seconds < best_s * (1 - WORTH_PARTS):
                chosen, best_s = size, seconds
        return chosen

    def best(self, *, num_sequences: int, max_sequences: int, most: int, may_try: bool = False) -> int:
        """Micro-batches for `num_sequences` that run or wait, at most `max_sequences` in each: from the number of stages,
        which it is before anything was measured, to `most`. With `may_try` those are tried too that should not be better: one a
        stage, and one in all, so that stages take turns."""
        computed = self._computed(num_sequences=num_sequences, max_sequences=max_sequences, most=most)
        if not may_try or not self._stages or not 2 <= num_sequences <= computed * max_sequences:
            return computed
        counts = (min(count, num_sequences) for count in (computed, self.num_stages, 1))
        candidates = list(dict.fromkeys(count for count in counts if count * max_sequences >= num_sequences))
        best = self._trials.best(candidates, num_sequences=num_sequences, steps_s=self._steps_s)
        return computed if best == candidates[0] else best

    def _computed(self, *, num_sequences: int, max_sequences: int, most: int) -> int:
        fewest = min(self.num_stages, most)
        if not self._stages:
            return fewest
        chosen, best = fewest, 0.0
        for count in range(fewest, most + 1):
            batch = min(max_sequences, num_sequences / count)
            times_s = [line.at(batch) for line in self._stages]
            overhead_s = self.overhead_s / (self.steps_at_once(round(batch)) if count == 1 else 1)
            slowest_s, through_s = count * max(times_s), sum(times_s) + SLACK * overhead_s
            throughput = count * batch / max(slowest_s, through_s, CLOCK_S)
            if throughput > best * (1 + WORTH):
                chosen, best = count, throughput
            if slowest_s >= through_s:
                break  # the slowest stage is never idle: more cannot help
        # Full ones cost nothing, up to where steps would only queue: nobody waits for a place because of a single sequence.
        for_all = -(-num_sequences // max_sequences)
        return max(chosen, min(for_all, chosen + EXTRA, most))
