"""`memory://name`: links between parts of one event loop, with the manners of a real transport and none of its noise."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from asyncpipe.errors import Broken, Invalid, Timeout
from asyncpipe.transport.base import AcceptHandler, LinkOptions, Listener, Transport
from asyncpipe.transport.credit import CreditedLink, Kind
from asyncpipe.wire.handshake import Hello, check_hello, decode_hello, encode_hello
from asyncpipe.wire.tensors import Buffer

SCHEME = "memory://"

_listeners: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, MemoryListener]] = WeakKeyDictionary()


class MemoryLink(CreditedLink):
    """One end; `peer` is the other. Messages arrive in a later turn of the loop, never within the sender's call."""

    peer: MemoryLink | None = None

    def _transmit(self, kind: Kind, *, value: int = 0, frames: Sequence[Buffer] = ()) -> None:
        if self.peer is None:
            raise Broken(f"{self.remote.role} {self.remote.node} is gone")
        self._loop.call_soon(self.peer._arrived, kind, value, tuple(frames))

    def _release(self) -> None:
        self.peer = None


class MemoryListener(Listener):
    def __init__(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> None:
        self.address = address
        self._hello = hello
        self._on_link = on_link
        self._options = options
        self._links: list[MemoryLink] = []

    def accept(self, hello: Hello, options: LinkOptions) -> MemoryLink:
        """The connector's end of a new link. Raises Refused."""
        remote = decode_hello(encode_hello(hello))
        check_hello(remote, token=self._hello.token)
        ours = MemoryLink(local=self._hello, remote=remote, options=self._options)
        theirs = MemoryLink(local=hello, remote=self._hello, options=options)
        ours.peer, theirs.peer = theirs, ours
        self._links.append(ours)
        self._on_link(ours)
        return theirs

    async def close(self) -> None:
        listeners = _listeners.get(asyncio.get_running_loop(), {})
        listeners.pop(self.address, None)
        for link in self._links:
            await link.close()
        self._links.clear()


class MemoryTransport(Transport):
    schemes = frozenset({"memory"})

    async def listen(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> Listener:
        if not address.removeprefix(SCHEME):
            raise Invalid(f"{address}: write memory://NAME")
        listeners = _listeners.setdefault(asyncio.get_running_loop(), {})
        if address in listeners:
            raise Invalid(f"{address} is already in use; choose another name")
        listener = listeners[address] = MemoryListener(address, hello=hello, on_link=on_link, options=options)
        return listener

    async def connect(self, address: str, *, hello: Hello, options: LinkOptions) -> MemoryLink:
        deadline_s = asyncio.get_running_loop().time() + options.handshake_s
        while asyncio.get_running_loop().time() < deadline_s:
            if listener := _listeners.get(asyncio.get_running_loop(), {}).get(address):
                return listener.accept(hello, options)
            await asyncio.sleep(min(0.01, options.handshake_s))
        raise Timeout(f"nobody answered at {address} within {options.handshake_s:g} s")
