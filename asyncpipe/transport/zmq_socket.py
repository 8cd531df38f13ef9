"""A plain ZeroMQ socket driven by an asyncio loop.

zmq.asyncio creates futures and polls for every message; here the socket's file descriptor is watched once, and each wake-up
drains what has arrived into a callback. The descriptor is edge-triggered: it wakes us when something *changes*, so every
wake-up reads until nothing is left, and every send looks whether it swallowed a wake-up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq

from asyncpipe.errors import Broken, Busy
from asyncpipe.wire.tensors import Buffer

MAX_MESSAGES_PER_TURN = 128
COPY_BELOW_BYTES = 65_536  # smaller frames are copied out of ZeroMQ: cheaper than keeping its message alive
LINGER_MS = 1000

log = logging.getLogger(__name__)

OnMessage = Callable[[list[Buffer]], None]


class LoopSocket:
    """`on_message` gets each received multipart message, from the loop, one at a time."""

    def __init__(self, socket: zmq.Socket[bytes], on_message: OnMessage) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._fd = socket.getsockopt(zmq.FD)
        self._drain_scheduled = False
        self._loop.add_reader(self._fd, self._drain)
        self._schedule_drain()

    @property
    def raw(self) -> zmq.Socket[bytes]:
        return self._socket

    @property
    def is_open(self) -> bool:
        return not self._socket.closed

    def send(self, parts: Sequence[Buffer]) -> None:
        """Raises Busy at the high-water mark, Broken when the socket is closed or the peer unknown to it."""
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            raise Busy("the transport's buffer for this peer is full") from None
        except zmq.ZMQError as error:
            raise Broken(f"cannot send: {error.strerror}") from None
        if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._schedule_drain()

    def close(self) -> None:
        """Stop receiving; what was sent goes out for at most a second more, in the background."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=LINGER_MS)

    def _schedule_drain(self) -> None:
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        for _ in range(MAX_MESSAGES_PER_TURN):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                log.warning("cannot receive: %s", error.strerror)
                return
            self._on_message([_buffer(frame) for frame in frames])
        self._schedule_drain()  # others get a turn in between


def _buffer(frame: zmq.Frame) -> Buffer:
    view = frame.buffer
    return bytes(view) if view.nbytes < COPY_BELOW_BYTES else view
