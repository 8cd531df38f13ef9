"""Every typed message of the inference pipeline, and one union per direction.

The messages are in `client_messages` and `stage_messages`; the docstring of each says who sends it and when. An actor decodes
nothing outside its union.
"""

from __future__ import annotations

from asyncpipe.errors import ErrorData
from asyncpipe.wire.client_messages import (
    Accepted,
    Cancel,
    Failed,
    Finished,
    Generate,
    GetStatus,
    IdleTimes,
    KVStatus,
    Piece,
    PipelineStatus,
    PromptScored,
    StageStatus,
    Status,
    Updates,
    Usage,
)
from asyncpipe.wire.fields import (
    MAX_CONTEXT_TOKENS,
    MAX_SEQUENCES_PER_STEP,
    MAX_STAGES,
    MAX_STEPS_AT_ONCE,
    Message,
    Name,
    Request,
)
from asyncpipe.wire.links import HostLink, LinkHosted, LinkOffer, Posted
from asyncpipe.wire.sampling import Alternative, FinishReason, Sampling, TokenLogprobs
from asyncpipe.wire.stage_messages import (
    Chunk,
    ClockReading,
    ConnectNext,
    Delta,
    GetClock,
    GetCounters,
    GetSpans,
    Join,
    LoadStage,
    Opened,
    PromptLogprobs,
    Ready,
    Span,
    Spans,
    StageCounters,
    StageFailed,
    StageReport,
    StageTiming,
    Step,
    Tokens,
    Welcome,
)
from asyncpipe.wire.tiers import Moved, TierBytes, TierReport, TransferReport


class ServiceReady(Message, frozen=True, kw_only=True):
    """coordinator -> launcher (`asyncpipe.local`), once its workers are up: where clients connect."""

    address: Name


class ServiceFailed(Message, frozen=True, kw_only=True):
    """coordinator -> launcher, instead of `ServiceReady`: why it cannot serve."""

    error: ErrorData


ServiceAnnouncement = ServiceReady | ServiceFailed
ClientToCoordinator = Generate | Cancel | GetStatus
WorkerToCoordinator = Join | Tokens | StageFailed
ToStage = LoadStage | ConnectNext | HostLink | GetCounters | GetClock | GetSpans | Step

__all__ = [
    "MAX_CONTEXT_TOKENS",
    "MAX_SEQUENCES_PER_STEP",
    "MAX_STAGES",
    "MAX_STEPS_AT_ONCE",
    "Accepted",
    "Alternative",
    "Cancel",
    "Chunk",
    "ClientToCoordinator",
    "ClockReading",
    "ConnectNext",
    "Delta",
    "Failed",
    "FinishReason",
    "Finished",
    "Generate",
    "GetClock",
    "GetCounters",
    "GetSpans",
    "GetStatus",
    "HostLink",
    "IdleTimes",
    "Join",
    "KVStatus",
    "LinkHosted",
    "LinkOffer",
    "LoadStage",
    "Message",
    "Moved",
    "Opened",
    "Piece",
    "PipelineStatus",
    "Posted",
    "PromptLogprobs",
    "PromptScored",
    "Ready",
    "Request",
    "Sampling",
    "ServiceAnnouncement",
    "ServiceFailed",
    "ServiceReady",
    "Span",
    "Spans",
    "StageCounters",
    "StageFailed",
    "StageReport",
    "StageStatus",
    "StageTiming",
    "Status",
    "Step",
    "TierBytes",
    "TierReport",
    "ToStage",
    "TokenLogprobs",
    "Tokens",
    "TransferReport",
    "Updates",
    "Usage",
    "Welcome",
    "WorkerToCoordinator",
]
