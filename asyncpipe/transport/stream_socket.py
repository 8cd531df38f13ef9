"""A stream socket of this machine, driven by the asyncio loop: multipart messages in, multipart messages out.

What is sent goes to the kernel at once, from the thread that sends, and wakes the peer's loop: between two processes there is
nobody else. What the kernel has no room for waits here, as it was given, and goes out as there is room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence

from asyncpipe.errors import Broken, Busy, WireError
from asyncpipe.transport.framing import MessageReader, head
from asyncpipe.wire.tensors import Buffer

MAX_READS_PER_TURN = 16
MAX_BUFFERS_PER_WRITE = 512  # the kernel takes 1024
SOCKET_BUFFER_BYTES = 1 << 20  # the kernel gives as much of it as it likes

log = logging.getLogger(__name__)

OnMessage = Callable[[list[Buffer]], None]
OnEnd = Callable[[WireError | None], None]


class StreamSocket:
    """`on_message` gets each message, from the loop, one at a time; `on_end` hears, once and after the last message, that no
    more will come, and of what cannot be read if that is why.
    """

    def __init__(
        self, connected: socket.socket, *, reader: MessageReader, on_message: OnMessage, on_end: OnEnd, max_waiting: int
    ) -> None:
        """At most `max_waiting` messages wait for room in the kernel."""
        connected.setblocking(False)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self.reader = reader
        self._socket = connected
        self._fd = connected.fileno()
        self._on_message = on_message
        self._on_end = on_end
        self._max_waiting = max_waiting
        self._waiting: deque[list[memoryview]] = deque()  # messages of which not all is sent
        self._is_ending = False  # nobody listens here any more, and the rest of what waits is given some time
        self._linger: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._on_readable)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Raises Busy when too much waits already, Broken when the socket is closed or the peer gone."""
        if self._is_ending:
            raise Broken("the peer is gone: the socket is closed")
        if len(self._waiting) >= self._max_waiting:
            raise Busy("the transport's buffer for this peer is full")
        rest = [memoryview(head(frames)), *(memoryview(frame) for frame in frames)]
        if not self._waiting:
            rest = self._write(rest)
        if rest:
            if not self._waiting:
                self._loop.add_writer(self._fd, self._on_writable)
            self._waiting.append(rest)

    def receive_all(self) -> None:
        """Hand over everything that has arrived, now, however much it is."""
        while self._receive():
            pass

    def close(self, *, linger_s: float) -> None:
        """Stop receiving; what was sent goes out for at most `linger_s` more, in the background."""
        if self._is_ending:
            return
        self._is_ending = True
        self._loop.remove_reader(self._fd)
        if self._waiting and linger_s > 0:
            self._linger = self._loop.call_later(linger_s, self._close)
        else:
            self._close()

    async def flushed(self) -> None:
        """A closed socket has sent what it had to send, or its time is up."""
        await self._closed.wait()

    def _on_readable(self) -> None:
        for _ in range(MAX_READS_PER_TURN):
            if not self._receive():
                return

    def _receive(self) -> bool:
        """False when nothing is there."""
        if self._is_ending:
            return False
        space = self.reader.space()
        try:
            num_bytes = self._socket.recv_into(space)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # a connection that was reset
            num_bytes = 0
        if num_bytes == 0:
            self._end(None)
            return False
        try:
            for message in self.reader.received(num_bytes):
                self._hand_over(message)
                if self._is_ending:
                    return False
        except WireError as error:
            self._end(error)
            return False
        return num_bytes == len(space)

    def _hand_over(self, message: list[Buffer]) -> None:
        """A faulty receiver is reported, and must not stop others' messages."""
        try:
            self._on_message(message)
        except Exception as error:
            self._loop.call_exception_handler({"message": "a receiver has failed", "exception": error})

    def _end(self, error: WireError | None) -> None:
        self._loop.remove_reader(self._fd)
        self._on_end(error)

    def _on_writable(self) -> None:
        while self._waiting:
            try:
                rest = self._write(self._waiting[0])
            except Broken:
                self._waiting.clear()
                break
            if rest:
                self._waiting[0] = rest
                return
            self._waiting.popleft()
        self._loop.remove_writer(self._fd)
        if self._is_ending:
            self._close()

    def _write(self, buffers: list[memoryview]) -> list[memoryview]:
        """What the kernel has no room for. Raises Broken."""
        while buffers:
            try:
                num_bytes = self._socket.sendmsg(buffers[:MAX_BUFFERS_PER_WRITE])
            except (BlockingIOError, InterruptedError):
                return buffers
            except OSError as error:
                raise Broken(f"the peer is gone: {error.strerror}") from None
            buffers = _after(buffers, num_bytes)
        return []

    def _close(self) -> None:
        if self._fd < 0:
            return
        if self._waiting:
            self._loop.remove_writer(self._fd)
            self._waiting.clear()
        if self._linger is not None:
            self._linger.cancel()
        self._fd = -1
        with contextlib.suppress(OSError):
            self._socket.close()
        self._closed.set()


def _after(buffers: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """`buffers` without their first `num_bytes`."""
    for index, buffer in enumerate(buffers):
        if num_bytes < buffer.nbytes:
            return [buffer.cast("B")[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= buffer.nbytes
    return []
