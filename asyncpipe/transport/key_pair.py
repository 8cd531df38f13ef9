"""CURVE key pairs as text: a key is 32 bytes, written in Z85 (ZeroMQ's RFC 32) as 40 characters."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from asyncpipe.errors import Invalid

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeyPair:
    """`public` may be shown to anybody; `secret` never leaves the machine, and is no part of the repr."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls) -> KeyPair:
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @classmethod
    def of_secret(cls, secret: str, *, source: str) -> KeyPair:
        """The pair of `secret`, which says its public half too. Raises Invalid, which names `source` and not the secret."""
        if not _is_key(secret):
            raise Invalid(f"{source} is not a CURVE secret key, 40 characters of Z85")
        return cls(zmq.curve_public(secret.encode()).decode(), secret)


def check_public_key(text: str, *, source: str) -> str:
    """`text` itself. Raises Invalid, which does not show it: it may be a secret key in the wrong place."""
    if not _is_key(text):
        raise Invalid(f"{source} is not a CURVE public key, 40 characters of Z85")
    return text


def _is_key(text: str) -> bool:
    try:
        return len(z85.decode(text)) == KEY_BYTES
    except (ValueError, KeyError, struct.error):
        return False
