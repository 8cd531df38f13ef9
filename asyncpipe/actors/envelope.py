"""The outside of every message between two systems: frame 0 says what it is and for whom, the rest is the message."""

from __future__ import annotations

import enum
from typing import Annotated, Any, get_args, get_origin

import msgspec
from msgspec import Meta

from asyncpipe.errors import ErrorData, Invalid
from asyncpipe.ids import MAX_ID_CHARS
from asyncpipe.wire.codec import Codec
from asyncpipe.wire.fields import Message, Request

NameText = Annotated[str, Meta(max_length=MAX_ID_CHARS)]
Correlation = Annotated[int, Meta(ge=0, le=2**53)]


class EnvelopeKind(enum.IntEnum):
    TELL = 0
    ASK = 1
    REPLY = 2  # `correlation` names the ask
    ERROR = 3  # likewise; the body is an ErrorData
    MONITOR = 4  # `sender` wants to hear of the end of `target`
    DOWN = 5  # `sender`, which `target` monitors, has ended; the body is an ErrorData


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """`target` is an actor of the receiving system, `sender` one of the sending system ("" when there is none)."""

    kind: EnvelopeKind
    target: NameText
    sender: NameText
    correlation: Correlation = 0


encode_envelope = msgspec.msgpack.Encoder().encode
decode_envelope = Codec[Envelope](Envelope).decode
decode_error = Codec[ErrorData](ErrorData).decode

_reply_codecs: dict[type[Message], Codec[Any]] = {}


def reply_codec(request: type[Message]) -> Codec[Any]:
    """Decodes the answers to `request`: the R of its base `Request[R]`. Raises Invalid for a message nobody answers."""
    if request not in _reply_codecs:
        _reply_codecs[request] = Codec(_reply_type(request))
    return _reply_codecs[request]


def _reply_type(request: type[Message]) -> Any:
    for base in getattr(request, "__orig_bases__", ()):
        if get_origin(base) is Request:
            return get_args(base)[0]
    raise Invalid(f"{request.__name__} is told, not asked: it does not derive from Request[Answer]")
