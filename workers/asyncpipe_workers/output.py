"""What a stage's compute gives for a step."""

from __future__ import annotations

from dataclasses import dataclass

from asyncpipe.wire.messages import PromptLogprobs, TokenLogprobs
from asyncpipe.wire.tensors import Tensor


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
