"""What the machine wants done."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from asyncpipe.errors import ErrorData
from asyncpipe.wire.messages import FinishReason, Step, TokenLogprobs


@dataclass(frozen=True, slots=True)
class IssueStep:
    """Send `step` to the first stage."""

    step: Step


class EmitToken(msgspec.Struct, frozen=True, gc=False):
    """A token for the client; indexes count from 0 without a gap. A struct, for they are made quickly and there are many."""

    request_id: str
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class EmitPromptLogprobs:
    """What the model thinks of the prompt's next tokens."""

    request_id: str
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRequest:
    """The request ends here, once. `time_to_first_token_s` is 0.0 when there was none."""

    request_id: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class FailRequest:
    """The request ends here, once, with an error."""

    request_id: str
    error: ErrorData


Command = IssueStep | EmitToken | EmitPromptLogprobs | FinishRequest | FailRequest
