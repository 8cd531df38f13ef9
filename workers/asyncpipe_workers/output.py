"""What a stage's compute takes, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from asyncpipe.wire.messages import PromptLogprobs, Step, TokenLogprobs
from asyncpipe.wire.tensors import Tensor


class ArrivedStep(NamedTuple):
    """A step to compute, and when it arrived, on the monotonic clock."""

    step: Step
    arrived_ns: int


@dataclass(frozen=True, slots=True)
class StageOutput:
    """`hidden` (T, D), except on the last stage, which gives tokens in micro-batch order, and what was asked about them.

    `began_ns` and `ended_ns` are the device's times, where they are not the compute thread's.
    """

    hidden: Tensor | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    began_ns: int = 0
    ended_ns: int = 0
