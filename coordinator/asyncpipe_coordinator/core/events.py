"""What can happen to the machine. Times are monotonic seconds of the coordinator's clock."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from asyncpipe.errors import ErrorData
from asyncpipe.wire.messages import Sampling, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A client asks for text, or for the rest of it. `seed` is drawn by the shell when the client gave none."""

    request_id: str
    client: Hashable
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    priority: int = 0
    deadline_at_s: float | None
    at_s: float
    generated_token_ids: tuple[int, ...] = ()  # by a coordinator before this one, for the same request


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensArrived:
    tokens: Tokens
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The client asked for it, or is gone."""

    request_id: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StopStringFound:
    """The shell saw a stop string in the text so far: the request is complete."""

    request_id: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineReady:
    """`kv_blocks` is what fits into the stage with the least room. In a ring the last stage reaches the first one. Stages that
    share memory are slower while others read it."""

    epoch: int
    kv_blocks: int
    at_s: float
    is_ring: bool = True
    shares_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineLost:
    """A stage is gone, and what all stages knew of sequences with it. Another pipeline will come: everyone waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineGone:
    """No other pipeline will come: everyone hears `error`."""

    error: ErrorData


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed: deadlines are looked at."""

    at_s: float


Event = Submitted | TokensArrived | Cancelled | StopStringFound | PipelineReady | PipelineLost | PipelineGone | Tick
