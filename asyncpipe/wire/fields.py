"""Bounded field types, and the base of every typed message.

Messages are frozen, tagged structs with bounds on every string and list, so that decoding is also validation. `Request[R]`
marks a message that is asked and answered with an `R`; everything else is told.
"""

from __future__ import annotations

from typing import Annotated, Generic, TypeVar

import msgspec
from msgspec import Meta

from asyncpipe.ids import MAX_ID_CHARS

MAX_PROMPT_CHARS = 4_000_000
MAX_CONTEXT_TOKENS = 1_048_576
MAX_SEQUENCES_PER_STEP = 4096
MAX_STEPS_AT_ONCE = 64
MAX_STAGES = 1024
MAX_PATH_CHARS = 4096

Count = Annotated[int, Meta(ge=0, le=2**53)]
Signed = Annotated[int, Meta(ge=-(2**62), le=2**62)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_CONTEXT_TOKENS)]
StepTokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)]
SequenceNumbers = Annotated[tuple[Count, ...], Meta(max_length=MAX_SEQUENCES_PER_STEP)]
Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS)]
Name = Annotated[str, Meta(max_length=MAX_PATH_CHARS)]
Text = Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Microseconds = Annotated[int, Meta(ge=0, le=2**53)]

R = TypeVar("R", bound="Message")


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Base of every typed message; the tag is the class name."""


class Request(Message, Generic[R], frozen=True, kw_only=True, omit_defaults=True):
    """A message that is asked; its answer is an `R`."""
