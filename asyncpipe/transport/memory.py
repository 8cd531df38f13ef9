"""`memory://name`: links between parts of one event loop, with the manners of a real transport and none of its noise."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from asyncpipe.errors import Broken, Busy, Timeout
from asyncpipe.transport.base import AcceptHandler, LinkOptions, Listener, Transport, address_in_use
from asyncpipe.transport.credit import CreditedLink, Kind, offer
from asyncpipe.wire.handshake import Hello, check_hello, decode_hello, encode_hello
from asyncpipe.wire.tensors import Buffer

CONNECT_RETRY_S = 0.01

_listeners: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, MemoryListener]] = WeakKeyDictionary()


class MemoryLink(CreditedLink):
    """One end; `peer` is the other. Messages arrive in a later turn of the loop, never within the sender's call."""

    peer: MemoryLink | None = None
    _num_on_the_way = 0

    def _transmit(self, kind: Kind, *, value: int = 0, frames: Sequence[Buffer] = ()) -> None:
        if self.peer is None:
            raise Broken(f"{self._peer} is gone")
        if kind is Kind.CONTROL and self._num_on_the_way >= self._window + self.options.control_window:
            raise Busy(f"{self._num_on_the_way} messages are on their way to {self._peer}")
        self._num_on_the_way += 1
        self._loop.call_soon(self._hand_over, self.peer, kind, value, tuple(frames))

    def _hand_over(self, peer: MemoryLink, kind: Kind, value: int, frames: Sequence[Buffer]) -> None:
        self._num_on_the_way -= 1
        peer._arrived(kind, value, frames)

    def _release(self) -> None:
        if self.peer is not None:
            self._loop.call_soon(self.peer._arrived, Kind.BYE, 0, ())  # also after `abort`, which says no goodbye
            self.peer = None


class MemoryListener(Listener):
    """A name in this loop's table."""

    def __init__(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> None:
        self.address = address
        self._hello = offer(hello, options)
        self._on_link = on_link
        self._options = options
        self._links: list[MemoryLink] = []

    def accept(self, hello: Hello, options: LinkOptions) -> MemoryLink:
        """The connector's end of a new link. Raises Refused."""
        remote = decode_hello(encode_hello(offer(hello, options)))
        check_hello(remote, token=self._hello.token)
        ours = MemoryLink(local=self._hello, remote=remote, options=self._options)
        theirs = MemoryLink(local=remote, remote=decode_hello(encode_hello(self._hello)), options=options)
        ours.peer, theirs.peer = theirs, ours
        self._links = [*(link for link in self._links if link.is_open), ours]
        self._on_link(ours)
        return theirs

    async def close(self) -> None:
        listeners = _listeners.get(asyncio.get_running_loop(), {})
        if listeners.get(self.address) is self:
            del listeners[self.address]
        for link in self._links:
            await link.close()
        self._links.clear()


class MemoryTransport(Transport):
    schemes = frozenset({"memory"})

    async def listen(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> Listener:
        listeners = _listeners.setdefault(asyncio.get_running_loop(), {})
        if address in listeners:
            raise address_in_use(address)
        listener = listeners[address] = MemoryListener(address, hello=hello, on_link=on_link, options=options)
        return listener

    async def connect(self, address: str, *, hello: Hello, options: LinkOptions) -> MemoryLink:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + options.handshake_s
        while True:
            if listener := _listeners.get(loop, {}).get(address):
                return listener.accept(hello, options)
            if loop.time() >= deadline_s:
                raise Timeout(f"nobody answered at {address} within {options.handshake_s:g} s")
            await asyncio.sleep(CONNECT_RETRY_S)
