"""The first message each way: schema-free MessagePack maps that every version of the protocol can read."""

from __future__ import annotations

import hmac
from collections.abc import Container
from dataclasses import dataclass

import msgpack

from asyncpipe.errors import Refused, WireError
from asyncpipe.ids import MAX_ID_CHARS, NodeId

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
MAGIC = "asyncpipe"
MAX_HELLO_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Hello:
    """Who is speaking and what it can take. `token` is a shared secret, empty where none is asked for."""

    node: NodeId
    role: str  # coordinator, worker, client, or a user's own word
    token: str = ""
    window: int = 32  # data messages the sender of this Hello is ready to hold
    max_frame_bytes: int = 1 << 30
    major: int = PROTOCOL_MAJOR
    minor: int = PROTOCOL_MINOR
    shm: str = ""  # proof of a shared kernel: see transport/shm.py; empty when shared memory is off


def encode_hello(hello: Hello) -> bytes:
    return _pack(
        {
            "magic": MAGIC,
            "major": hello.major,
            "minor": hello.minor,
            "node": hello.node,
            "role": hello.role,
            "token": hello.token,
            "window": hello.window,
            "max_frame_bytes": hello.max_frame_bytes,
            "shm": hello.shm,
        }
    )


def decode_hello(data: bytes | memoryview) -> Hello:
    """Raises WireError for anything that is not a Hello; unknown keys of newer minors are ignored."""
    fields = _unpack(data)
    try:
        hello = Hello(
            node=NodeId(_text(fields, "node")),
            role=_text(fields, "role"),
            token=_text(fields, "token", default=""),
            window=_number(fields, "window", low=1, high=1 << 20),
            max_frame_bytes=_number(fields, "max_frame_bytes", low=1, high=1 << 50),
            major=_number(fields, "major", low=0, high=1 << 16),
            minor=_number(fields, "minor", low=0, high=1 << 16),
            shm=_text(fields, "shm", default=""),
        )
    except KeyError as missing:
        raise WireError(f"Hello lacks {missing}") from None
    if fields.get("magic") != MAGIC or not hello.node:
        raise WireError("not an asyncpipe Hello")
    return hello


def encode_refusal(reason: str) -> bytes:
    return _pack({"magic": MAGIC, "refused": reason[:1024]})


def decode_refusal(data: bytes | memoryview) -> str:
    return _text(_unpack(data), "refused", default="no reason given", limit=1024)


def check_hello(hello: Hello, *, token: str, roles: Container[str] | None = None) -> None:
    """Raises Refused when a peer of this Hello cannot be spoken to, or does not know `token`.

    `roles` are those that its key gives it; None where no keys are used, and it may have any.
    """
    if hello.major != PROTOCOL_MAJOR:
        raise Refused(f"protocol {hello.major}.{hello.minor} is not spoken here; this side speaks {PROTOCOL_MAJOR}.x")
    if token and not hmac.compare_digest(hello.token.encode(), token.encode()):
        raise Refused("wrong or missing token")
    if roles is not None and hello.role not in roles:
        raise Refused(f"this key is not allowed to be a {hello.role!r}")


def _pack(fields: dict[str, object]) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def _unpack(data: bytes | memoryview) -> dict[str, object]:
    if len(data) > MAX_HELLO_BYTES:
        raise WireError(f"a Hello of {len(data)} bytes; at most {MAX_HELLO_BYTES}")
    try:
        fields = msgpack.unpackb(data)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise WireError(f"not a Hello: {error}") from None
    if not isinstance(fields, dict):
        raise WireError("not a Hello: not a map")
    return fields


def _text(fields: dict[str, object], key: str, *, default: str | None = None, limit: int = MAX_ID_CHARS) -> str:
    value = fields[key] if default is None else fields.get(key, default)
    if not isinstance(value, str) or len(value) > limit:
        raise WireError(f"Hello.{key} must be text of at most {limit} characters")
    return value


def _number(fields: dict[str, object], key: str, *, low: int, high: int) -> int:
    value = fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise WireError(f"Hello.{key} must be a number from {low} to {high}")
    return value
