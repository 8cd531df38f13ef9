"""From an address to the transport that speaks it."""

from __future__ import annotations

from asyncpipe.errors import Invalid
from asyncpipe.transport.base import Transport
from asyncpipe.transport.memory import MemoryTransport
from asyncpipe.transport.unix import UnixTransport
from asyncpipe.transport.zmq import ZmqTransport

_TRANSPORTS: tuple[Transport, ...] = (MemoryTransport(), UnixTransport(), ZmqTransport())


def transport_for(address: str) -> Transport:
    """Raises Invalid for a scheme that no transport has, naming those there are."""
    scheme, separator, rest = address.partition("://")
    for transport in _TRANSPORTS:
        if separator and rest and scheme in transport.schemes:
            return transport
    known = ", ".join(f"{scheme}://" for transport in _TRANSPORTS for scheme in sorted(transport.schemes))
    raise Invalid(f"{address!r} is not an address; write one of {known}")
