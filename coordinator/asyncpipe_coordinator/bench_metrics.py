"""From the arrival times of tokens, and two readings of the status, to a benchmark's figures. Pure.

Latencies and throughputs are those that FlexLLMGen logs, measured at the client: prefill lasts until the last request has its
first token, decode from there until the last request has its last one. When only the first tokens of many are generated, the
rest of decoding is *projected* as FlexLLMGen does it: the first two steps as measured, and the mean of the others for each
that is missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from asyncpipe.model_shape import ModelShape
from asyncpipe.wire.messages import Moved, StageStatus, Status, TransferReport

NUM_FIRST_STEPS = 2  # that are not typical, and count as measured
TOGETHER_S = 0.0005  # tokens of one message are no further apart; those of two come further apart than that
MIN_CUT_GEN_LEN = NUM_FIRST_STEPS + 2  # the first token comes with the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`num_prompts` prompts of `prompt_len` tokens, `gen_len` generated for each; only `cut_gen_len` of them are really run."""

    num_prompts: int
    prompt_len: int
    gen_len: int
    cut_gen_len: int | None = None

    @property
    def num_generated(self) -> int:
        """For each prompt, really."""
        return self.gen_len if self.cut_gen_len is None else self.cut_gen_len

    @property
    def is_projected(self) -> bool:
        return self.num_generated < self.gen_len


class Rate(NamedTuple):
    latency_s: float
    tokens_per_s: float


class Spread(NamedTuple):
    """Over all requests."""

    p50: float
    p95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """`decode` and `total` are projected where `projected` says so; `measured_decode` and `measured_total` never are."""

    projected: bool
    prefill: Rate
    decode: Rate
    total: Rate
    measured_decode: Rate
    measured_total: Rate
    first_token_s: Spread
    per_token_s: Spread  # of a request, the mean time between two tokens after the first
    step_s: tuple[float, ...]  # from all requests having a token to all having the next; the first is prefill

    @property
    def wall_s(self) -> float:
        """From the first request's start to the last token, as measured."""
        return self.measured_total.latency_s


def measure(workload: Workload, arrivals_s: Sequence[Sequence[float]]) -> Metrics:
    """`arrivals_s` has a list for each request: when each of its tokens arrived, in seconds since the start."""
    ends_s = [max(times) for times in zip(*arrivals_s, strict=True)]
    step_s = (ends_s[0], *step_times(ends_s))
    prompts, gen_len = workload.num_prompts, workload.gen_len
    prefill_s, measured_s = step_s[0], sum(step_s[1:])
    decode_s = project(step_s[1:], gen_len - 1) if workload.is_projected else measured_s
    num_run = workload.num_generated
    return Metrics(
        projected=workload.is_projected,
        prefill=_rate(prompts * workload.prompt_len, prefill_s),
        decode=_rate(prompts * (gen_len - 1), decode_s),
        total=_rate(prompts * gen_len, prefill_s + decode_s),
        measured_decode=_rate(prompts * (num_run - 1), measured_s),
        measured_total=_rate(prompts * num_run, prefill_s + measured_s),
        first_token_s=_spread([times[0] for times in arrivals_s]),
        per_token_s=_spread([(times[-1] - times[0]) / max(len(times) - 1, 1) for times in arrivals_s]),
        step_s=step_s,
    )


def step_times(ends_s: Sequence[float]) -> list[float]:
    """Seconds from each of `ends_s` to the next. Steps whose tokens come together have equal parts of their time."""
    groups: list[list[float]] = []
    for start, end in itertools.pairwise(ends_s):
        if groups and end - start < TOGETHER_S:
            groups[-1].append(end - start)
        else:
            groups.append([end - start])
    return [sum(group) / len(group) for group in groups for _ in group]


def project(decode_step_s: Sequence[float], num_steps: int) -> float:
    """Seconds of `num_steps` decode steps, of which the first few are given."""
    first, rest = decode_step_s[:NUM_FIRST_STEPS], decode_step_s[NUM_FIRST_STEPS:]
    return sum(first) + sum(rest) / len(rest) * (num_steps - len(first))


# --- the stages ---


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """What a stage did within `wall_s`: computing, waiting for bytes of other tiers, and the rest."""

    stage: int
    wall_s: float
    busy_s: float  # with the waits for bytes
    moved: TransferReport

    @property
    def compute_s(self) -> float:
        return max(self.busy_s - self.moved.wait_s, 0.0)

    @property
    def idle_s(self) -> float:
        """No micro-batch was there."""
        return max(self.wall_s - self.busy_s, 0.0)

    @property
    def exposed_share(self) -> float:
        """Of the time, spent waiting for bytes."""
        return self.moved.wait_s / self.wall_s if self.wall_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineUse:
    """Like `PipelineStatus`, of a part of the time."""

    num_micro_batches: int
    steps: int
    ideal_s: float
    measured_s: float
    efficiency: float
    bubble: float
    preemptions: int


def stage_uses(before: Status, after: Status, *, wall_s: float) -> tuple[StageUse, ...]:
    """Between two readings that are `wall_s` of work apart."""
    return tuple(
        StageUse(
            stage=last.stage,
            wall_s=wall_s,
            busy_s=max(last.busy_s - first.busy_s, 0.0),
            moved=_moved_since(first, last),
        )
        for first, last in zip(before.stages, after.stages, strict=True)
    )


def pipeline_use(before: Status, after: Status) -> PipelineUse:
    first, last = before.pipeline, after.pipeline
    ideal_s, measured_s = last.ideal_s - first.ideal_s, last.measured_s - first.measured_s
    busy_s = sum(use.busy_s for use in stage_uses(before, after, wall_s=measured_s))
    return PipelineUse(
        num_micro_batches=last.num_micro_batches,
        steps=last.steps - first.steps,
        ideal_s=ideal_s,
        measured_s=measured_s,
        efficiency=min(ideal_s / measured_s, 1.0) if measured_s > 0 else 0.0,
        bubble=max(0.0, 1.0 - busy_s / (len(after.stages) * measured_s)) if measured_s > 0 else 0.0,
        preemptions=after.kv.preemptions - before.kv.preemptions,
    )


def _moved_since(before: StageStatus, after: StageStatus) -> TransferReport:
    names = TransferReport.__struct_fields__
    return TransferReport(
        **{name: _difference(getattr(after.transfers, name), getattr(before.transfers, name)) for name in names}
    )


def _difference(after: Moved, before: Moved) -> Moved:
    return Moved(
        max(after.num_bytes - before.num_bytes, 0),
        max(after.busy_s - before.busy_s, 0.0),
        max(after.wait_s - before.wait_s, 0.0),
    )


# --- sizes ---


class Sizes(NamedTuple):
    """Bytes by FlexLLMGen's formulas, which count two for each number."""

    model: int
    cache: int
    hidden: int


def flexllmgen_sizes(model: ModelShape, workload: Workload) -> Sizes:
    """Of an OPT of this shape, and of the keys and values, and hidden states, of all prompts."""
    layers, h, vocab = model.num_layers, model.hidden_size, model.vocab_size
    layer = h * (3 * h + 1) + h * (h + 1) + h * (4 * h + 1) + 4 * h * (h + 1) + 4 * h
    tokens = workload.num_prompts * (workload.prompt_len + workload.gen_len)
    return Sizes(model=2 * (layers * layer + vocab * (h + 1)), cache=4 * tokens * layers * h, hidden=2 * tokens * h)


# --- small things ---


def _rate(num_tokens: int, seconds: float) -> Rate:
    return Rate(seconds, num_tokens / seconds if seconds > 0 else 0.0)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(_percentile(values, 50), _percentile(values, 95))


def _percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest, by their distances."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
