"""What the transport tests share: joined links, and a receiver that remembers."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import gc
import os
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import zmq

from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.ids import NodeId
from asyncpipe.transport.base import Delivery, Link, LinkOptions, Listener
from asyncpipe.transport.credit import Kind
from asyncpipe.transport.curve import curve_client
from asyncpipe.transport.registry import transport_for
from asyncpipe.wire.handshake import Hello, encode_hello
from tests.support import until

HEADER = struct.Struct("<BI")  # said again on purpose: the tests pin the format
SERVER = Hello(node=NodeId("node-s"), role="coordinator")
CLIENT = Hello(node=NodeId("node-c"), role="worker")
OPTIONS = LinkOptions(window=4, heartbeat_s=0.1, silence_s=2.0)


@dataclass
class Recorder:
    """Keeps deliveries; consumes them at once unless told to hold."""

    holds: bool = False
    deliveries: list[Delivery] = field(default_factory=list)
    lost: asyncio.Future[AsyncPipeError] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def on_delivery(self, link: Link, delivery: Delivery, /) -> None:
        self.deliveries.append(delivery)
        if not self.holds:
            delivery.done()

    def on_lost(self, link: Link, error: AsyncPipeError, /) -> None:
        self.lost.set_result(error)  # raises when called twice

    def bodies(self) -> list[list[bytes]]:
        return [[bytes(frame) for frame in delivery.frames] for delivery in self.deliveries]

    async def has(self, count: int, *, timeout_s: float = 5.0) -> list[list[bytes]]:
        """The messages, once there are `count` of them."""
        await until(lambda: len(self.deliveries) >= count, timeout_s=timeout_s)
        return self.bodies()


async def listen(address: str, *, hello: Hello = SERVER, options: LinkOptions = OPTIONS) -> tuple[Listener, list[Link]]:
    accepted: list[Link] = []
    listener = await transport_for(address).listen(address, hello=hello, on_link=accepted.append, options=options)
    return listener, accepted


async def listen_when_free(address: str, options: LinkOptions) -> tuple[Listener, list[Link]]:
    """A socket closed a moment ago is given back in the background."""
    deadline_s = time.monotonic() + 5
    while True:
        try:
            return await listen(address, options=options)
        except Invalid:
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(0.01)


async def connect(address: str, *, hello: Hello = CLIENT, options: LinkOptions = OPTIONS) -> Link:
    return await transport_for(address).connect(address, hello=hello, options=options)


@dataclass
class Pair:
    """A link's two ends, and who listens there."""

    listener: Listener
    ours: Link  # the connector's
    theirs: Link  # the listener's
    our_receiver: Recorder
    their_receiver: Recorder


@contextlib.asynccontextmanager
async def joined(address: str, *, options: LinkOptions = OPTIONS, holds: bool = False) -> AsyncIterator[Pair]:
    """Two ends that have shaken hands; the listener's end holds its deliveries if `holds`."""
    listener, accepted = await listen(address, hello=offer(SERVER, options), options=options)
    try:
        ours = await connect(listener.address, hello=offer(CLIENT, options), options=options)
        await until(lambda: accepted)
        pair = Pair(listener, ours, accepted[0], Recorder(), Recorder(holds=holds))
        pair.ours.start(pair.our_receiver)
        pair.theirs.start(pair.their_receiver)
        yield pair
        await ours.close()
    finally:
        await listener.close()


def offer(hello: Hello, options: LinkOptions) -> Hello:
    return replace(hello, window=options.window, max_frame_bytes=options.max_frame_bytes)


def num_open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def free_name() -> str:
    return f"asyncpipe-test-{secrets.token_hex(6)}"


class Stranger(abc.ABC):
    """Says whatever it likes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None: ...

    @abc.abstractmethod
    def say(self, *frames: bytes) -> None: ...

    @abc.abstractmethod
    def heard(self) -> list[list[bytes]]:
        """What has arrived since it was asked last."""

    def say_hello(self, hello: Hello = CLIENT) -> None:
        self.say(HEADER.pack(Kind.HELLO, 0), encode_hello(hello))

    async def hear(self, kind: Kind, *, timeout_s: float = 5.0) -> Sequence[bytes]:
        """The frames after the header of the next message of this kind."""
        heard: list[list[bytes]] = []

        def arrived() -> bool:
            heard.extend(self.heard())
            return any(message[0][0] == kind for message in heard)

        await until(arrived, timeout_s=timeout_s)
        return next(message[1:] for message in heard if message[0][0] == kind)


class ZmqStranger(Stranger):
    """A raw DEALER, with the keys in `options` if there are any."""

    def __init__(self, address: str, *, routing_id: bytes = b"", options: LinkOptions = OPTIONS) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        if routing_id:
            self._socket.setsockopt(zmq.ROUTING_ID, routing_id)
        if client := curve_client(address, options):
            client.prepare(self._socket)
        self._socket.connect(address)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def say(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def heard(self) -> list[list[bytes]]:
        messages = []
        while self._socket.poll(0):
            messages.append(self._socket.recv_multipart())
        return messages


class UnixStranger(Stranger):
    """A raw stream socket. The format of messages is said again on purpose: the tests pin it."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect("\0" + address.removeprefix("ipc://@"))
        self._socket.setblocking(False)
        self._arrived = self._unsaid = b""
        self.is_cut_off = False

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def say(self, *frames: bytes) -> None:
        self.say_bytes(struct.pack(f"<I{len(frames)}Q", len(frames), *map(len, frames)) + b"".join(frames))

    def say_bytes(self, data: bytes) -> None:
        """What the kernel has no room for is said while we listen."""
        self._unsaid += data
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._unsaid:
                self._unsaid = self._unsaid[self._socket.send(self._unsaid) :]

    def heard(self) -> list[list[bytes]]:
        self.say_bytes(b"")
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self._socket.recv(65_536):
                self._arrived += data
            self.is_cut_off = True
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages

    def _take(self) -> list[bytes] | None:
        if len(self._arrived) < 4:
            return None
        (count,) = struct.unpack_from("<I", self._arrived)
        sizes = struct.unpack_from(f"<{count}Q", self._arrived, 4)
        frames, at = [], 4 + 8 * count
        if len(self._arrived) < at + sum(sizes):
            return None
        for size in sizes:
            frames.append(self._arrived[at : at + size])
            at += size
        self._arrived = self._arrived[at:]
        return frames


def stranger_at(address: str) -> Stranger:
    return UnixStranger(address) if address.startswith("ipc://") else ZmqStranger(address)
