"""A plain ZeroMQ socket driven by an asyncio loop.

zmq.asyncio creates futures and polls for every message; here the socket's file descriptor is watched once, and each wake-up
drains what has arrived into a callback. The descriptor is edge-triggered: it wakes us when something *changes*, so every
wake-up reads until nothing is left, and every send looks whether it swallowed a wake-up.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence

import zmq
import zmq.utils.garbage  # here, so that its exit handler, which frees what is being sent, runs after ours
from zmq.utils.monitor import parse_monitor_message

from asyncpipe.errors import Broken, Busy
from asyncpipe.transport.credit import nbytes_of
from asyncpipe.wire.tensors import Buffer

MAX_MESSAGES_PER_TURN = 128
COPY_BELOW_BYTES = 65_536  # smaller frames are copied: cheaper than keeping their ZeroMQ message alive
LINGER_MS = 1000

# Plain integers: to combine or convert pyzmq's enums takes as long as a small send.
NOBLOCK = int(zmq.NOBLOCK)
SEND_MORE = NOBLOCK | int(zmq.SNDMORE)
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)

log = logging.getLogger(__name__)

OnMessage = Callable[[list[Buffer]], None]
OnEvent = Callable[[int, int], None]


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """The context that all sockets of this process share, as `inproc://` needs."""
    return _context_of(os.getpid())


@functools.cache
def _context_of(pid: int) -> zmq.Context[zmq.Socket[bytes]]:
    """Keyed by process: a context does not survive a fork."""
    created: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    atexit.register(_flush_at_exit, created, pid)
    return created


def _flush_at_exit(created: zmq.Context[zmq.Socket[bytes]], pid: int) -> None:
    """What closed sockets still had to send goes out before the process ends, for at most LINGER_MS."""
    if pid == os.getpid() and not created.closed:
        for monitor in _open_monitors:
            monitor.be_silent(created)
        created.destroy(linger=0)  # of sockets still open: their owners did not care to close them


class LoopSocket:
    """`on_message` gets each received multipart message, from the loop, one at a time."""

    def __init__(self, socket: zmq.Socket[bytes], on_message: OnMessage) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._drain_scheduled = False
        self._loop.add_reader(self._fd, self._drain)
        self._schedule_drain()

    @property
    def is_open(self) -> bool:
        return not self._socket.closed

    def key_at_hand(self) -> str | None:
        """The public key of who sent the message that `on_message` has now; None where no keys are used."""
        return None

    def send(self, parts: Sequence[Buffer]) -> None:
        """Raises Busy at the high-water mark, Broken when the socket is closed or the peer unknown to it."""
        try:
            self._send_parts(parts)
        except zmq.Again:
            raise Busy("the transport's buffer for this peer is full") from None
        except zmq.ZMQError as error:
            raise Broken(f"the peer is gone: {error.strerror}") from None
        finally:
            self._look_again()

    def close(self, *, linger_ms: int = LINGER_MS) -> None:
        """Stop receiving; what was sent goes out for at most `linger_ms` more, in the background."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=linger_ms)

    def receive_all(self) -> None:
        """Hand over everything that has arrived, now, however much it is."""
        while self._receive_one():
            pass

    def _send_parts(self, parts: Sequence[Buffer]) -> None:
        """As `send_multipart`, which takes half as long again for what we know already."""
        send, last = self._socket.send, len(parts) - 1
        for index, part in enumerate(parts):
            send(part, NOBLOCK if index == last else SEND_MORE, copy=nbytes_of(part) < COPY_BELOW_BYTES)

    def _look_again(self) -> None:
        """Sending, failed or not, may have swallowed the wake-up for a message that has arrived."""
        if not self._drain_scheduled and self.is_open and int(self._socket.getsockopt(EVENTS)) & POLLIN:
            self._schedule_drain()

    def _schedule_drain(self) -> None:
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        for _ in range(MAX_MESSAGES_PER_TURN):
            if not self._receive_one():
                return
        self._schedule_drain()  # others get a turn in between

    def _receive_one(self) -> bool:
        """False when nothing is there."""
        try:
            message = self._receive_parts()
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if not self._socket.closed:
                log.warning("cannot receive: %s", error.strerror)
            return False
        try:
            self._on_message(message)
        except BaseException:
            self._schedule_drain()  # a faulty receiver is reported by the loop, and must not stop the others' messages
            raise
        return True

    def _receive_parts(self) -> list[Buffer]:
        parts: list[Buffer] = []
        receive = self._socket.recv
        while True:
            frame = receive(NOBLOCK, copy=False)
            parts.append(frame.bytes if len(frame) < COPY_BELOW_BYTES else frame.buffer.toreadonly())
            if not frame.more:
                return parts


class RouterSocket(LoopSocket):
    """For a ROUTER with CURVE: knows whose message it has at hand."""

    _routing_id: zmq.Frame

    def key_at_hand(self) -> str:
        """Empty when nobody vouches for one."""
        try:
            return str(self._routing_id.get("User-Id"))
        except zmq.ZMQError:
            return ""

    def _receive_parts(self) -> list[Buffer]:
        """Remembers the first frame, in which ZeroMQ keeps what it knows of the sender, rather than a large one."""
        self._routing_id = first = self._socket.recv(NOBLOCK, copy=False)
        return [first.bytes, *super()._receive_parts()] if first.more else [first.bytes]


class Monitor:
    """Tells `on_event`, from the loop, what ZeroMQ says happens to `socket`: an EVENT_ constant, and a number that explains it.

    As pyzmq's `get_monitor_socket`, with two differences. It has no high-water mark, at which ZeroMQ would stop all I/O of
    this process until somebody reads on: strangers cause events, too. And one that nobody closes stays, rather than be
    collected before its socket, whose next event ZeroMQ would then wait for ever to tell.
    """

    def __init__(self, socket: zmq.Socket[bytes], events: int, on_event: OnEvent) -> None:
        self._watched = socket
        self._on_event = on_event
        address = f"inproc://asyncpipe-monitor-{next(_monitor_numbers)}"
        socket.monitor(address, events)
        pair = context().socket(zmq.PAIR)
        pair.setsockopt(zmq.RCVHWM, 0)
        pair.connect(address)
        self._pair = LoopSocket(pair, self._on_message)
        _open_monitors.add(self)

    def close(self) -> None:
        """To be called before the socket is closed."""
        self._watched.disable_monitor()
        self._pair.close(linger_ms=0)
        _open_monitors.discard(self)

    def be_silent(self, ending: zmq.Context[zmq.Socket[bytes]]) -> None:
        """When a context ends, which closes its sockets in any order."""
        if self._watched.context is ending and not self._watched.closed:
            self._watched.disable_monitor()

    def _on_message(self, parts: list[Buffer]) -> None:
        event = parse_monitor_message([bytes(part) for part in parts])
        self._on_event(event["event"], event["value"])


_monitor_numbers = itertools.count(1)
_open_monitors: set[Monitor] = set()
