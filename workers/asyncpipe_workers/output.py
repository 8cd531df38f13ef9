"""What a stage's compute takes, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from asyncpipe.wire.messages import PromptLogprobs, Step, TokenLogprobs
from asyncpipe.wire.tensors import Tensor

if TYPE_CHECKING:
    import torch


class ArrivedStep(NamedTuple):
    """A step to compute, when it arrived, on the monotonic clock, and its hidden states if they came beside the message."""

    step: Step
    arrived_ns: int
    hidden: torch.Tensor | None = None


class Posting(NamedTuple):
    """Hidden states for the link beside the messages; on a GPU they are there when `after` has happened."""

    hidden: torch.Tensor
    after: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True)
class StageOutput:
    """`hidden` (T, D), except on the last stage, which gives tokens in micro-batch order, and what was asked about them. Where
    hidden states do not travel in messages, they are `posted`, on the stage's device.

    `began_ns` and `ended_ns` are the device's times, where they are not the compute thread's.
    """

    hidden: Tensor | None = None
    posted: Posting | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    began_ns: int = 0
    ended_ns: int = 0


def joined(outputs: Sequence[StageOutput]) -> StageOutput:
    """Of several steps at once, one after the other. Only a prompt brings scores of it, so they are the first one's."""
    return replace(
        outputs[0],
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        logprobs=tuple(scores for output in outputs for scores in output.logprobs),
    )
