"""The half of a link that every transport shares: credits, lanes, deliveries, and how a link ends.

A sender may have a window of data messages in flight: the smaller one of what both Hellos offer, so that both ends know
it. The receiver grants credits back as its deliveries are done, in batches of half of what the sender could have by now:
a consumer that keeps up never makes it wait, and a sender without credits gets what is done as soon as that is half of
what is not held.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from asyncpipe.errors import AsyncPipeError, Broken, Busy, Closed, Invalid, Timeout, WireError
from asyncpipe.transport.base import Delivery, Lane, Link, LinkOptions, LinkStatistics, Receiver
from asyncpipe.wire.handshake import Hello, decode_refusal, encode_refusal
from asyncpipe.wire.tensors import Buffer

BUSY_RETRY_S = 0.005  # a message with a credit but no room in the transport (control messages filled it) tries again

log = logging.getLogger(__name__)


class Kind(enum.IntEnum):
    """First byte of every message on the wire."""

    HELLO = 1  # connector -> listener: an encoded Hello
    WELCOME = 2  # listener -> connector: an encoded Hello
    REFUSE = 3  # an encoded refusal: the answer to a Hello, or the end of a link whose peer broke the protocol
    DATA = 4
    CONTROL = 5
    CREDIT = 6  # value: how many data messages may be sent in addition
    PING = 7
    BYE = 8
    SHARED = 9  # shared memory: "I can read yours"; this and the next five are explained in shm.py
    SEGMENT = 10  # value: file descriptor of a new segment
    MAPPED = 11  # value: 1 when the oldest unanswered segment was mapped, else 0
    RELEASE = 12  # value: number of a region that is free again
    SHARED_DATA = 13  # DATA with a table of regions first; the frames that are not in it follow
    SHARED_CONTROL = 14  # CONTROL likewise


def offer(hello: Hello, options: LinkOptions) -> Hello:
    """`hello` as this end means it: never more than its options allow."""
    return replace(
        hello,
        window=min(hello.window, options.window),
        max_frame_bytes=min(hello.max_frame_bytes, options.max_frame_bytes),
    )


class CreditedLink(Link):
    """Subclasses carry messages (`_transmit`) and release what they hold (`_release`)."""

    def __init__(self, *, local: Hello, remote: Hello, options: LinkOptions) -> None:
        self.local = local
        self.remote = remote
        self.options = options
        self._loop = asyncio.get_running_loop()
        self._peer = f"{remote.role} {remote.node}"
        self._window = self._credits = min(local.window, remote.window)
        self._outstanding = 0  # data messages delivered and not done
        self._to_grant = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._receiver: Receiver | None = None
        self._backlog: deque[Delivery] = deque()
        self._end: AsyncPipeError | None = None
        self._sent_messages = self._sent_bytes = self._received_messages = self._received_bytes = 0

    # --- what a transport provides ---

    @abc.abstractmethod
    def _transmit(self, kind: Kind, *, value: int = 0, frames: Sequence[Buffer] = ()) -> None:
        """Hand one message to the transport. Raises Busy when its bounded buffer is full, Broken: the peer is gone."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Let go of everything; called once, when the link has ended."""

    # --- Link ---

    @property
    def is_open(self) -> bool:
        return self._end is None

    def start(self, receiver: Receiver) -> None:
        self._receiver = receiver
        while self._backlog:
            receiver.on_delivery(self, self._backlog.popleft())
        if self._end is not None:
            receiver.on_lost(self, self._end)

    async def send(self, frames: Sequence[Buffer], *, timeout_s: float) -> None:
        num_bytes = self._check_outgoing(frames)
        deadline_s = self._loop.time() + timeout_s
        while True:
            await self._take_credit(timeout_s)
            try:
                return self._transmit_counted(Kind.DATA, frames, num_bytes)
            except Busy:
                if self._loop.time() >= deadline_s:
                    raise Timeout(f"no room in the transport to {self._peer} for {timeout_s:g} s") from None
                await asyncio.sleep(BUSY_RETRY_S)

    def try_send(self, frames: Sequence[Buffer]) -> None:
        num_bytes = self._check_outgoing(frames)
        if self._credits <= 0 or self._waiters:
            raise Busy(f"{self._peer} has {self._window} messages that it has not taken yet")
        self._credits -= 1
        self._transmit_counted(Kind.DATA, frames, num_bytes)

    def send_control(self, frames: Sequence[Buffer]) -> None:
        self._transmit_counted(Kind.CONTROL, frames, self._check_outgoing(frames))

    async def close(self) -> None:
        if self._end is not None:
            return
        with contextlib.suppress(AsyncPipeError):  # gone already: then it needs no goodbye
            self._transmit(Kind.BYE)
        self._finish(Closed(f"the link to {self._peer} was closed"))

    def abort(self, error: AsyncPipeError) -> None:
        self._finish(error)

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(
            sent_messages=self._sent_messages,
            sent_bytes=self._sent_bytes,
            received_messages=self._received_messages,
            received_bytes=self._received_bytes,
            credits=self._credits,
            senders_waiting=len(self._waiters),
            shared_memory_bytes=self._shared_memory_bytes(),
        )

    # --- arriving messages ---

    def _arrived(self, kind: int, value: int, frames: Sequence[Buffer]) -> None:
        """Take one message from the wire; whatever is wrong with it ends this link, and only this link."""
        if self._end is not None:
            return
        try:
            self._dispatch(kind, value, frames)
        except WireError as error:
            self._refuse(error)
        except AsyncPipeError as error:
            self._finish(error)

    def _refuse(self, error: WireError) -> None:
        """The peer's bytes are not this protocol."""
        log.warning("ended a link: %s", error)
        with contextlib.suppress(AsyncPipeError):
            self._transmit(Kind.REFUSE, frames=[encode_refusal(str(error))])
        self._finish(error)

    def _dispatch(self, kind: int, value: int, frames: Sequence[Buffer]) -> None:
        match kind:
            case Kind.DATA:
                self._on_data(frames)
            case Kind.CONTROL:
                self._check_incoming(frames)
                self._deliver(Delivery(frames, Lane.CONTROL, None))
            case Kind.CREDIT:
                self._on_credit(value)
            case Kind.PING:
                pass
            case Kind.BYE:
                raise Broken(f"{self._peer} closed the link")
            case Kind.REFUSE:
                raise Broken(f"{self._peer} ended the link: {decode_refusal(b''.join(frames[:1]))}")
            case _:
                raise WireError(f"{self._peer} sent a message of unknown kind {kind}")

    def _on_data(self, frames: Sequence[Buffer]) -> None:
        self._check_incoming(frames)
        self._outstanding += 1
        if self._outstanding + self._to_grant > self._window:
            raise WireError(f"{self._peer} sent more than its window of {self._window}")
        self._deliver(Delivery(frames, Lane.DATA, self._on_done))
        self._grant()

    def _check_incoming(self, frames: Sequence[Buffer]) -> None:
        if not 0 < len(frames) <= self.options.max_frames:
            raise WireError(f"{self._peer} sent a message of {len(frames)} frames")
        num_bytes = sum(map(nbytes_of, frames))
        if num_bytes > self.local.max_frame_bytes and max(map(nbytes_of, frames)) > self.local.max_frame_bytes:
            raise WireError(f"{self._peer} sent a frame of more than {self.local.max_frame_bytes} bytes")
        self._received_messages += 1
        self._received_bytes += num_bytes

    def _deliver(self, delivery: Delivery) -> None:
        if self._receiver is None:
            if len(self._backlog) > self._window + self.options.control_window:
                raise WireError(f"{self._peer} sent too much before it was heard")
            self._backlog.append(delivery)
        else:
            self._receiver.on_delivery(self, delivery)

    def _on_done(self) -> None:
        self._outstanding -= 1
        self._to_grant += 1
        self._grant()

    def _grant(self) -> None:
        """Due at half of what is not held here. At zero credits, all of that is ours to grant: nobody starves."""
        if self._end is not None or self._to_grant == 0 or self._to_grant * 2 < self._window - self._outstanding:
            return
        with contextlib.suppress(AsyncPipeError):  # Busy: granted with the next ones; Broken: nobody is left to grant to
            self._put(Kind.CREDIT, value=self._to_grant)
            self._to_grant = 0

    def _on_credit(self, value: int) -> None:
        if not 0 < value <= self._window - self._credits:
            raise WireError(f"{self._peer} granted {value} credits that it does not have")
        self._credits += value
        while self._credits > 0 and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._credits -= 1
                waiter.set_result(None)

    # --- sending ---

    def _check_open(self) -> None:
        if self._end is not None:
            raise type(self._end)(str(self._end))

    def _check_outgoing(self, frames: Sequence[Buffer]) -> int:
        """The message's size in bytes, when it may be sent."""
        self._check_open()
        if not 0 < len(frames) <= self.options.max_frames:
            raise Invalid(f"a message has 1 to {self.options.max_frames} frames, not {len(frames)}")
        num_bytes = 0
        for frame in frames:
            size = nbytes_of(frame)
            if size > self.remote.max_frame_bytes:
                raise Invalid(f"a frame of {size} bytes; the peer takes at most {self.remote.max_frame_bytes}")
            num_bytes += size
        return num_bytes

    def _transmit_counted(self, kind: Kind, frames: Sequence[Buffer], num_bytes: int) -> None:
        try:
            self._put(kind, frames=frames)
        except Busy:
            if kind is Kind.DATA:
                self._on_credit(1)
            raise
        self._sent_messages += 1
        self._sent_bytes += num_bytes

    def _put(self, kind: Kind, *, value: int = 0, frames: Sequence[Buffer] = ()) -> None:
        try:
            self._transmit(kind, value=value, frames=frames)
        except Broken as error:
            self._on_unreachable(error)
            raise

    def _on_unreachable(self, error: Broken) -> None:
        """The peer cannot be sent to any more."""
        self._finish(error)

    async def _take_credit(self, timeout_s: float) -> None:
        if self._credits > 0 and not self._waiters:
            self._credits -= 1
        else:
            await self._wait_for_credit(timeout_s)
            self._check_open()

    async def _wait_for_credit(self, timeout_s: float) -> None:
        """In order of arrival. A credit given to a waiter that is cancelled goes to the next one."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            self._give_back(waiter)
            raise Timeout(f"{self._peer} took no message for {timeout_s:g} s ({self._window} are waiting there)") from None
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise

    def _give_back(self, waiter: asyncio.Future[None]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif waiter.done() and not waiter.cancelled() and waiter.exception() is None and self._end is None:
            self._on_credit(1)

    # --- the end ---

    def _finish(self, error: AsyncPipeError) -> None:
        if self._end is not None:
            return
        self._end = error
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(type(error)(str(error)))
        self._release()
        if self._receiver is not None:
            self._loop.call_soon(self._receiver.on_lost, self, error)

    def _shared_memory_bytes(self) -> int:
        return 0


def nbytes_of(frame: Buffer) -> int:
    """`len` counts elements, which are not always bytes."""
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)
