"""Messages between clients and the coordinator."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from asyncpipe.errors import ErrorData
from asyncpipe.policy import Policy
from asyncpipe.wire.fields import (
    MAX_CONTEXT_TOKENS,
    MAX_SEQUENCES_PER_STEP,
    MAX_STAGES,
    Count,
    Id,
    Message,
    Name,
    Request,
    Seconds,
    Seed,
    Text,
    TokenId,
    TokenIds,
)
from asyncpipe.wire.links import LinkKind
from asyncpipe.wire.sampling import FinishReason, Sampling, TokenLogprobs
from asyncpipe.wire.tiers import TierReport, TransferReport

# --- client -> coordinator --------------------------------------------------------------------------------------------


class Accepted(Message, frozen=True, kw_only=True):
    """coordinator -> client, the answer to `Generate`: it is queued; updates follow."""

    request_id: Id
    prompt_token_ids: TokenIds
    seed: Seed = 0  # given or drawn: with it the same request has the same tokens


class Generate(Request[Accepted], frozen=True, kw_only=True, omit_defaults=True):
    """client -> coordinator: generate from `prompt` or `prompt_token_ids` (exactly one).

    Requests of a higher `priority` leave the waiting queue first. With `generated_token_ids` it goes on after those, which the
    client has from a coordinator before this one: the next piece has the index of their number.
    """

    request_id: Id
    prompt: Text | None = None
    prompt_token_ids: TokenIds | None = None
    sampling: Sampling = Sampling()
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    deadline_s: Seconds | None = None  # from arrival; None is no deadline of the client's own
    generated_token_ids: TokenIds = ()


class Cancel(Message, frozen=True, kw_only=True):
    """client -> coordinator: the request ends with finish_reason `cancelled`; unknown ids are ignored."""

    request_id: Id


class IdleTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Why a stage's compute thread did not compute, in seconds since its first step."""

    starved_s: Seconds = 0.0  # the pipeline had work, but none was here: a bubble
    send_wait_s: Seconds = 0.0  # the next stage took nothing
    no_work_s: Seconds = 0.0  # the whole pipeline was empty


class StageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One stage as `status` shows it. `busy_share` is compute time over the time that the pipeline had work, 0..1."""

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
    transfers: TransferReport = TransferReport()  # between memory tiers; waits for them are part of busy_s
    peak_host_bytes: Count = 0  # of the worker process
    peak_device_bytes: Count = 0  # on a GPU
    idle: IdleTimes = IdleTimes()
    link: LinkKind = LinkKind.ZMQ  # by which its hidden states go to the next stage
    kv_blocks: Count = 0  # blocks that fit into this stage's KV memory
    policy: Policy = Policy()  # what was asked for
    tiers: TierReport = TierReport()  # what became of it


class PipelineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How well the stages are used, over the time that there was work.

    `efficiency` is `ideal_s` over `measured_s`: the makespan of the same steps with the same stage times when nothing else
    takes time and no stage ever waits for a micro-batch to come back. `bubble` is the share of stage time without compute.
    """

    num_micro_batches: Count
    steps: Count
    ideal_s: Seconds
    measured_s: Seconds
    efficiency: float
    bubble: float
    round_trip_s: Seconds  # of a step, recently
    overhead_s: Seconds  # of that, what is neither computing nor waiting in a stage: links and the coordinator


class KVStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of the key-value cache, by the stage with the least room."""

    num_blocks: Count
    used_blocks: Count
    block_tokens: Count
    preemptions: Count


class Status(Message, frozen=True, kw_only=True):
    """coordinator -> client, the answer to `GetStatus`."""

    model: Name
    state: Name
    uptime_s: Seconds
    restarts: Count = 0  # times that lost stages were replaced
    spares: Count = 0  # workers that wait to take a lost one's place
    requests_waiting: Count
    requests_running: Count
    requests_finished: Count
    requests_failed: Count
    prompt_tokens: Count
    generated_tokens: Count
    max_context_len: Count
    pipeline: PipelineStatus
    kv: KVStatus
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


class Piece(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Once per token of a choice, in order. `text` may be empty while a character is incomplete."""

    request_id: Id
    index: Count
    token_id: TokenId
    text: Text
    choice: Count = 0
    logprobs: TokenLogprobs | None = None


class PromptScored(Message, frozen=True, kw_only=True):
    """Log-probabilities of the prompt's next tokens, in order; the first token of a prompt has none."""

    request_id: Id
    logprobs: Annotated[tuple[TokenLogprobs, ...], Meta(max_length=MAX_CONTEXT_TOKENS)]


class Finished(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The last update of a choice. `text` is what no piece has carried yet."""

    request_id: Id
    finish_reason: FinishReason
    text: Text
    usage: Usage
    choice: Count = 0


class Failed(Message, frozen=True, kw_only=True):
    """The last update of a request that could not be finished."""

    request_id: Id
    error: ErrorData


class Updates(Message, frozen=True, kw_only=True):
    """coordinator -> client: what has happened to its requests, in order; usually the tokens of one step."""

    updates: Annotated[
        tuple[Piece | PromptScored | Finished | Failed, ...], Meta(min_length=1, max_length=2 * MAX_SEQUENCES_PER_STEP)
    ]
