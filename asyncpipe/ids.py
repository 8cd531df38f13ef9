"""Identifiers, each a type of its own so that mypy tells them apart."""

from __future__ import annotations

import secrets
from typing import NewType

ActorName = NewType("ActorName", str)
NodeId = NewType("NodeId", str)  # one ActorSystem, hence one process
RequestId = NewType("RequestId", str)
SequenceId = NewType("SequenceId", int)  # one generated sequence, unique for the life of a coordinator
StageIndex = NewType("StageIndex", int)  # 0 is the first stage
MicroBatchIndex = NewType("MicroBatchIndex", int)
StepIndex = NewType("StepIndex", int)
Epoch = NewType("Epoch", int)  # counts the pipelines a coordinator has built; older messages are stale

MAX_ID_CHARS = 128


def new_node_id() -> NodeId:
    return NodeId(secrets.token_hex(8))


def new_request_id() -> RequestId:
    return RequestId(f"req-{secrets.token_hex(8)}")
