"""What the last stage tells the coordinator, and when: after each step, or of several steps at once after the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncpipe.wire.messages import StageTiming, Step, Tokens
from asyncpipe_workers.output import StageOutput, joined

Timings = tuple[StageTiming, ...]


@dataclass(slots=True)
class _Round:
    """Steps of a micro-batch that follow each other by themselves."""

    first: int  # the number of the first
    outputs: list[StageOutput] = field(default_factory=list)
    timings: list[Timings] = field(default_factory=list)


class Gathering:
    """Of all micro-batches."""

    def __init__(self) -> None:
        self._rounds: dict[int, _Round] = {}

    def add(self, step: Step, timings: Timings, output: StageOutput) -> Tokens | None:
        """None while more tokens are to come before the coordinator hears of any."""
        if step.is_gathered:
            gathered = self._rounds.setdefault(step.micro_batch, _Round(step.step))
            gathered.outputs.append(output)
            gathered.timings.append(timings)
            if step.delta.num_steps > 1:
                return None
            del self._rounds[step.micro_batch]
            return _tokens(step, gathered.first, _sums(gathered.timings), joined(gathered.outputs))
        return _tokens(step, step.step, timings, output)

    def clear(self) -> None:
        """What was begun is of no use to anybody."""
        self._rounds.clear()


def _sums(timings: Sequence[Timings]) -> Timings:
    """Of each stage, over the steps."""
    of_stages = zip(*timings, strict=True)
    return tuple(StageTiming(sum(t.queue_us for t in stage), sum(t.compute_us for t in stage)) for stage in of_stages)


def _tokens(step: Step, number: int, timings: Timings, output: StageOutput) -> Tokens:
    return Tokens(
        epoch=step.epoch,
        micro_batch=step.micro_batch,
        step=number,
        token_ids=output.token_ids,
        timings=timings,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
    )
