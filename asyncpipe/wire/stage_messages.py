"""Messages between the coordinator and the stages, and from stage to stage."""

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
    MAX_STEPS_AT_ONCE,
    Count,
    Message,
    Microseconds,
    Name,
    Request,
    Seconds,
    SequenceNumbers,
    Signed,
    StepTokenIds,
    Text,
    TokenIds,
)
from asyncpipe.wire.links import LinkKind, Posted
from asyncpipe.wire.sampling import Sampling, TokenLogprobs
from asyncpipe.wire.tensors import Tensor
from asyncpipe.wire.tiers import TierReport, TransferReport

MAX_SPANS_PER_MESSAGE = 8192

# --- steps ------------------------------------------------------------------------------------------------------------


class Opened(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the stages have not seen: its tokens so far, none of which is computed yet.

    `num_prompt` of `token_ids` are the prompt; the rest were generated before the sequence lost its KV. `sampling` has its
    seed filled in.
    """

    sequence: Count
    token_ids: TokenIds
    num_prompt: Count
    sampling: Sampling = Sampling()


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """The next `count` tokens of an opened sequence. With its last one the sequence joins the step's micro-batch."""

    sequence: Count
    count: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)]


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What changes before a step is computed, applied by every stage in this order.

    `left` sequences are forgotten, wherever they are. `parted` leave the micro-batch but keep their KV. `adopted`, parted from
    another one before, are appended. Then every member gets one token of `token_ids`, in order (stages after the first only
    need the number). `opened` begin; `chunks` are computed after the members' tokens; a sequence whose last chunk this is
    becomes a member. `padding` rows follow that belong to nobody (static batching pays for its padding).

    With `num_steps`, the members go on, in further steps, with what the last stage has just chosen for them, without a turn
    through the coordinator (multi-step decoding): the last stage gives the first one a step with their tokens, of one less.
    """

    left: SequenceNumbers = ()
    parted: SequenceNumbers = ()
    adopted: SequenceNumbers = ()
    token_ids: StepTokenIds = ()
    opened: Annotated[tuple[Opened, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)] = ()
    chunks: Annotated[tuple[Chunk, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)] = ()
    padding: Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)] = 0
    num_steps: Annotated[int, Meta(ge=1, le=MAX_STEPS_AT_ONCE)] = 1

    @property
    def num_rows(self) -> int:
        """Tokens to compute, padding included, in the first of its steps."""
        return len(self.token_ids) + sum(chunk.count for chunk in self.chunks) + self.padding


class StageTiming(msgspec.Struct, frozen=True, array_like=True):
    """One stage's part of a step: from its arrival to the start of computing, and computing."""

    queue_us: Microseconds
    compute_us: Microseconds


Timings = Annotated[tuple[StageTiming, ...], Meta(max_length=MAX_STAGES)]


class Step(Message, frozen=True, kw_only=True, omit_defaults=True):
    """coordinator -> stage 0, stage k -> stage k + 1 with `hidden`, and last stage -> stage 0 for the next of several steps:
    compute one step of one micro-batch.

    `hidden` is (T, D): T counts the step's rows. Over a link beside the messages it is `posted`. `timings` has one entry a
    stage that the step has passed. While a step `is_alone` in the pipeline, all stages but one rest. If it `is_gathered`, its
    tokens come with those of the steps that follow it by themselves, after the last of them.
    """

    epoch: Count
    micro_batch: Count
    step: Count
    delta: Delta
    timings: Timings = ()
    hidden: Tensor | None = None
    posted: Posted | None = None
    is_alone: bool = False
    is_gathered: bool = False


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """What a chunk's rows say of the prompt tokens that follow them."""

    sequence: Count
    logprobs: Annotated[tuple[TokenLogprobs, ...], Meta(max_length=MAX_CONTEXT_TOKENS)]


class Tokens(Message, frozen=True, kw_only=True, omit_defaults=True):
    """last stage -> coordinator, once per `Step`: the sampled token of each member, in micro-batch order. A stage that is the
    whole pipeline answers all of `num_steps` at once: all of the first one's, then all of the second's, and so on; so does a
    ring where the steps are gathered, with the sums of their timings.

    `logprobs` is empty when no member asked for them, else as long as `token_ids`.
    """

    epoch: Count
    micro_batch: Count
    step: Count
    token_ids: StepTokenIds
    timings: Timings = ()
    logprobs: Annotated[tuple[TokenLogprobs | None, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)] = ()
    prompt_logprobs: Annotated[tuple[PromptLogprobs, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)] = ()


# --- worker -> coordinator --------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True):
    """coordinator -> worker, the answer to `Join`."""

    epoch: Count


class Join(Request[Welcome], frozen=True, kw_only=True):
    """worker -> coordinator, first: who it is and where its predecessor can reach it."""

    slot: Count | None = None  # which of the processes that the coordinator has started; None: of none
    rank: Count | None = None  # which stage it would like to be: that of its place in its launcher's job
    stage: Count | None = None  # which one it has been, for a coordinator before this one, and still holds
    pid: Count
    host: Name  # as people call it: a container has a name of its own
    machine: Name = ""  # the same for all processes of one machine, and no other
    device: Name
    device_name: Name = ""  # as its maker calls it
    card: Name = ""  # a GPU's UUID: device numbers repeat where processes see different cards
    memory_bytes: Count = 0  # of the device, in all
    num_cores: Count = 0  # that the process may use
    address: Name
    public_key: Name = ""  # by which whoever connects to `address` knows it


class StageReport(Message, frozen=True, kw_only=True):
    """worker -> coordinator, the answer to `LoadStage`: what this stage now holds."""

    stage: Count
    layers: tuple[Count, Count]
    num_params: Count
    param_bytes: Count
    load_s: Seconds
    kv_blocks: Count  # that fit into this stage's KV memory
    kv_block_bytes: Count
    tiers: TierReport = TierReport()


class StageFailed(Message, frozen=True, kw_only=True):
    """any stage -> coordinator: `stage` could not compute a step, or the one before it in the ring cannot reach it."""

    epoch: Count
    stage: Count
    error: ErrorData


class StageCounters(Message, frozen=True, kw_only=True):
    """stage -> coordinator, the answer to `GetCounters`. Times since the start of the first step."""

    stage: Count
    steps: Count
    busy_s: Seconds
    send_wait_s: Seconds
    span_s: Seconds  # to the end of the last step
    transfers: TransferReport = TransferReport()
    peak_host_bytes: Count = 0  # of the whole process
    peak_device_bytes: Count = 0  # on a GPU


class ClockReading(Message, frozen=True, kw_only=True):
    """stage -> coordinator, the answer to `GetClock`: the worker's monotonic clock."""

    monotonic_ns: Signed


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Something a stage did, on the worker's monotonic clock. `kind` is one of `asyncpipe.trace.SpanKind`."""

    kind: Annotated[int, Meta(ge=0, lt=64)]
    micro_batch: Count
    step: Count
    start_ns: Signed
    duration_ns: Count
    num_rows: Count


class Spans(Message, frozen=True, kw_only=True):
    """stage -> coordinator, the answer to `GetSpans`: those since `first`, and how many the ring has lost before it."""

    first: Count
    num_lost: Count
    spans: Annotated[tuple[Span, ...], Meta(max_length=MAX_SPANS_PER_MESSAGE)]


# --- coordinator -> worker --------------------------------------------------------------------------------------------


class LoadStage(Request[StageReport], frozen=True, kw_only=True, omit_defaults=True):
    """coordinator -> worker: become stage `stage` with decoder layers [first_layer, last_layer) of the checkpoint."""

    epoch: Count
    stage: Count
    num_stages: Annotated[int, Meta(ge=1, le=MAX_STAGES)]
    first_layer: Count
    last_layer: Count
    checkpoint: Name  # a directory on the worker's own file system; with `dummy_weights` only a name
    model: Name = ""  # a hub name, or `asyncpipe.model_place.BUNDLED`: where to look when there is no such directory
    device: Name = ""  # to compute on; empty: that of the worker's own command line
    cpus: Name = ""  # to keep to, like 0-3,8; empty: those it has
    previous_key: Name = ""  # of the stage before, the last one for the first, which will connect; empty: none is asked for
    config_json: Text  # the model's config.json
    dummy_weights: bool = False  # random ones instead of the checkpoint's
    dtype: Name  # float32, bfloat16, float16
    quantize: Name = ""  # int8, int4: the form in which matrices are multiplied; empty: in `dtype`
    model_impl: Name = "auto"  # native: our own code; transformers: its; auto: ours where there is any
    max_context_len: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)]
    max_sequences: Annotated[int, Meta(ge=1, le=2**20)]  # in all micro-batches together
    eos_token_ids: StepTokenIds = ()
    num_threads: Count = 0  # compute threads; 0 leaves torch's default
    machine_threads: Count = 0  # of all stages on its machine, for steps that are alone; 0: no more than its own
    kv_block_tokens: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)]
    kv_dtype: Name = "auto"  # of keys and values, as `dtype`; auto: what is quickest where that loses less than `quantize` does
    kv_bytes: Count | None = None  # memory for keys and values; None: `kv_share` of what is free once the layers are loaded
    kv_share: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.5
    policy: Policy = Policy()
    offload_dir: Name = ""  # where a run makes its own folder for what is on disk; empty: the system's temporary folder


class Ready(Message, frozen=True, kw_only=True):
    """worker -> coordinator, the answer to `ConnectNext`: how its hidden states travel, and why not as was wanted; of the last
    stage why it cannot reach the first, if so."""

    stage: Count
    link: LinkKind = LinkKind.ZMQ
    obstacle: Name = ""


class ConnectNext(Request[Ready], frozen=True, kw_only=True):
    """coordinator -> worker, after every stage has loaded: where the next stage listens, and for the last one the first (None:
    it is that itself)."""

    epoch: Count
    address: Name | None
    public_key: Name = ""  # that the next stage must have; empty: none is asked for
    link: Name = LinkKind.ZMQ  # for hidden states: one of LINK_WISHES


class GetCounters(Request[StageCounters], frozen=True, kw_only=True):
    """coordinator -> worker: busy time so far."""


class GetClock(Request[ClockReading], frozen=True, kw_only=True):
    """coordinator -> worker: what is your time? Asked a few times, to align clocks."""


class GetSpans(Request[Spans], frozen=True, kw_only=True):
    """coordinator -> worker: what was recorded from span number `first` on."""

    first: Count
