"""Every typed message of the inference pipeline: what it says, who sends it, and when.

Messages are frozen, tagged structs with bounds on every string and list, so that decoding is also validation. `Request[R]`
marks a message that is asked and answered with an `R`; everything else is told. There is one union per direction, at the
end of the file; an actor decodes nothing outside its union.
"""

from __future__ import annotations

import enum
from typing import Annotated, Generic, TypeVar

import msgspec
from msgspec import Meta

from asyncpipe.errors import ErrorData
from asyncpipe.ids import MAX_ID_CHARS
from asyncpipe.wire.tensors import Tensor

MAX_PROMPT_CHARS = 4_000_000
MAX_CONTEXT_TOKENS = 1_048_576
MAX_SEQUENCES_PER_STEP = 4096
MAX_STAGES = 1024
MAX_STOP_STRINGS = 16
MAX_PATH_CHARS = 4096

Count = Annotated[int, Meta(ge=0, le=2**53)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_CONTEXT_TOKENS)]
Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS)]
Name = Annotated[str, Meta(max_length=MAX_PATH_CHARS)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]

R = TypeVar("R", bound="Message")


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Base of every typed message; the tag is the class name."""


class Request(Message, Generic[R], frozen=True, kw_only=True, omit_defaults=True):
    """A message that is asked; its answer is an `R`."""


# --- sampling ---------------------------------------------------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen. `temperature` 0.0 is greedy; `top_k` 0 and `top_p` 1.0 are off; `seed` None is fresh entropy.

    `max_new_tokens` None means up to the context length.
    """

    max_new_tokens: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=2**31)] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    seed: Seed | None = None
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=1024)], ...], Meta(max_length=MAX_STOP_STRINGS)] = ()
    ignore_eos: bool = False


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token or a stop string
    LENGTH = "length"  # max_new_tokens or the end of the context
    CANCELLED = "cancelled"


# --- client -> coordinator --------------------------------------------------------------------------------------------


class Accepted(Message, frozen=True, kw_only=True):
    """coordinator -> client, the answer to `Generate`: it is queued; pieces follow."""

    request_id: Id
    prompt_token_ids: TokenIds


class Generate(Request[Accepted], frozen=True, kw_only=True, omit_defaults=True):
    """client -> coordinator: generate from `prompt` or `prompt_token_ids` (exactly one)."""

    request_id: Id
    prompt: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)] | None = None
    prompt_token_ids: TokenIds | None = None
    sampling: Sampling = Sampling()
    deadline_s: Seconds | None = None  # from arrival; None is no deadline of the client's own


class Cancel(Message, frozen=True, kw_only=True):
    """client -> coordinator: the request ends with finish_reason `cancelled`; unknown ids are ignored."""

    request_id: Id


class StageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One stage as `status` shows it. `busy_share` is compute time over time since the first step, 0..1."""

    stage: Count
    pid: Count
    device: Name
    host: Name
    layers: tuple[Count, Count]  # [first, last)
    num_params: Count
    param_bytes: Count
    steps: Count = 0
    busy_s: Seconds = 0.0
    busy_share: float = 0.0


class Status(Message, frozen=True, kw_only=True):
    """coordinator -> client, the answer to `GetStatus`."""

    model: Name
    state: Name
    uptime_s: Seconds
    num_micro_batches: Count
    requests_waiting: Count
    requests_running: Count
    requests_finished: Count
    prompt_tokens: Count
    generated_tokens: Count
    max_context_len: Count
    stages: Annotated[tuple[StageStatus, ...], Meta(max_length=MAX_STAGES)] = ()


class GetStatus(Request[Status], frozen=True, kw_only=True):
    """client -> coordinator: what is running."""


# --- coordinator -> client --------------------------------------------------------------------------------------------


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts, and seconds since the coordinator received the request."""

    prompt_tokens: Count
    completion_tokens: Count
    time_to_first_token_s: Seconds = 0.0
    total_s: Seconds = 0.0


class Piece(Message, frozen=True, kw_only=True):
    """coordinator -> client, once per token, in order. `text` may be empty while a character is incomplete."""

    request_id: Id
    index: Count
    token_id: TokenId
    text: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]


class Finished(Message, frozen=True, kw_only=True):
    """coordinator -> client: the last message of a request. `text` is what no piece has carried yet."""

    request_id: Id
    finish_reason: FinishReason
    text: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
    usage: Usage


class Failed(Message, frozen=True, kw_only=True):
    """coordinator -> client: the last message of a request that could not be finished."""

    request_id: Id
    error: ErrorData


# --- worker -> coordinator --------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True):
    """coordinator -> worker, the answer to `Join`."""

    epoch: Count


class Join(Request[Welcome], frozen=True, kw_only=True):
    """worker -> coordinator, first: who it is and where its predecessor can reach it."""

    slot: Count  # which spawned worker this is; the coordinator maps slots to stages
    pid: Count
    host: Name
    device: Name
    address: Name


class StageReport(Message, frozen=True, kw_only=True):
    """worker -> coordinator, the answer to `LoadStage`: what this stage now holds in memory."""

    stage: Count
    layers: tuple[Count, Count]
    num_params: Count
    param_bytes: Count
    load_s: Seconds


class Tokens(Message, frozen=True, kw_only=True):
    """last stage -> coordinator, once per `Step`: the sampled token of each sequence, in micro-batch order."""

    epoch: Count
    micro_batch: Count
    step: Count
    token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)]


class StageFailed(Message, frozen=True, kw_only=True):
    """any stage -> coordinator: a step could not be computed."""

    epoch: Count
    stage: Count
    error: ErrorData


class StageCounters(Message, frozen=True, kw_only=True):
    """stage -> coordinator, the answer to `GetCounters`."""

    stage: Count
    steps: Count
    busy_s: Seconds
    span_s: Seconds  # from the start of the first step to the end of the last


# --- coordinator -> worker --------------------------------------------------------------------------------------------


class LoadStage(Request[StageReport], frozen=True, kw_only=True):
    """coordinator -> worker: become stage `stage` with decoder layers [first_layer, last_layer) of the checkpoint."""

    epoch: Count
    stage: Count
    num_stages: Annotated[int, Meta(ge=1, le=MAX_STAGES)]
    first_layer: Count
    last_layer: Count
    checkpoint: Name  # a directory on the worker's own file system
    dtype: Name  # float32, bfloat16, float16
    max_context_len: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)]
    num_threads: Count = 0  # compute threads; 0 leaves torch's default


class Ready(Message, frozen=True, kw_only=True):
    """worker -> coordinator, the answer to `ConnectNext`."""

    stage: Count


class ConnectNext(Request[Ready], frozen=True, kw_only=True):
    """coordinator -> worker, after every stage has loaded: where the next stage listens (None on the last)."""

    epoch: Count
    address: Name | None


class GetCounters(Request[StageCounters], frozen=True, kw_only=True):
    """coordinator -> worker: busy time so far."""


class Joined(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A sequence that enters a micro-batch, at its end, with its whole prompt."""

    sequence: Count
    token_ids: TokenIds
    temperature: float = 0.0
    top_k: Count = 0
    top_p: float = 1.0
    seed: Seed = 0


class Delta(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What changes in a micro-batch before a step is computed.

    First the sequences in `left` leave and their KV is freed; the others keep their order. Then each of them gets one
    token of `token_ids` (same order); stages after the first only need its length. Then `joined` are appended.
    """

    left: Annotated[tuple[Count, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)] = ()
    token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)] = ()
    joined: Annotated[tuple[Joined, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)] = ()


class Step(Message, frozen=True, kw_only=True, omit_defaults=True):
    """coordinator -> stage 0, and stage k -> stage k + 1 with `hidden`: compute one step of one micro-batch.

    `hidden` is (T, D): T counts all new tokens of the step, sequence after sequence in micro-batch order.
    """

    epoch: Count
    micro_batch: Count
    step: Count
    delta: Delta
    hidden: Tensor | None = None


# --- coordinator -> the process that launched it ----------------------------------------------------------------------


class ServiceReady(Message, frozen=True, kw_only=True):
    """coordinator -> launcher (`asyncpipe.local`), once its workers are up: where clients connect."""

    address: Name


class ServiceFailed(Message, frozen=True, kw_only=True):
    """coordinator -> launcher, instead of `ServiceReady`: why it cannot serve."""

    error: ErrorData


ServiceAnnouncement = ServiceReady | ServiceFailed
ClientToCoordinator = Generate | Cancel | GetStatus
CoordinatorToClient = Piece | Finished | Failed
WorkerToCoordinator = Join | Tokens | StageFailed
ToStage = LoadStage | ConnectNext | GetCounters | Step
