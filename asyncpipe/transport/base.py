"""What a transport is: an address scheme that yields links.

A `Link` joins two peers that have said Hello. It carries messages (lists of frames) in order, in two lanes: data, which
waits for credits that the receiver grants as it consumes, and control, which data cannot block. A received message is a
`Delivery`; calling `done()` on it, once, returns its credit to the sender.

Words: Closed (this side closed the link), Broken (the peer is gone: died, silent, cut off), Busy (a bounded buffer is full),
Timeout (no credit in time), Refused (the peer's answer to our Hello), WireError (the peer's bytes are not this protocol).
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.transport.keys import Keys
from asyncpipe.wire.handshake import Hello
from asyncpipe.wire.tensors import Buffer


class Lane(enum.IntEnum):
    DATA = 0
    CONTROL = 1


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Bounds of a link, all chosen by the one who opens it."""

    window: int = 32  # data messages a sender may have in flight, not yet consumed by the receiver
    control_window: int = 4096  # control messages buffered before send_control raises Busy
    max_frame_bytes: int = 1 << 30
    max_frames: int = 66
    heartbeat_s: float = 0.25
    silence_s: float = 2.25  # a peer silent for so long is Broken at the next heartbeat
    handshake_s: float = 5.0
    shared_memory: bool = True  # large frames go through memory that both processes map, where the kernel is shared
    keys: Keys | None = None  # tcp with keys is authenticated and encrypted (CURVE), on both ends or not at all
    server_key: str | None = None  # public key of who listens where we connect to; None: of our coordinator
    insecure: bool = False  # let tcp without keys be reached from other machines


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    sent_messages: int
    sent_bytes: int
    received_messages: int
    received_bytes: int
    credits: int  # data messages that may still be sent before a wait
    senders_waiting: int
    shared_memory_bytes: int  # of sent_bytes, how many went through shared memory


class Delivery:
    """One received message. `frames` stay valid while referenced; `done()` returns the credit (idempotent)."""

    __slots__ = ("_on_done", "frames", "lane")

    def __init__(self, frames: Sequence[Buffer], lane: Lane, on_done: Callable[[], None] | None) -> None:
        self.frames = frames
        self.lane = lane
        self._on_done = on_done

    def done(self) -> None:
        if self._on_done is not None:
            on_done, self._on_done = self._on_done, None
            on_done()


class Receiver(Protocol):
    """Who a link hands its messages to. Called from the event loop, never concurrently; must not block or raise."""

    def on_delivery(self, link: Link, delivery: Delivery, /) -> None: ...

    def on_lost(self, link: Link, error: AsyncPipeError, /) -> None:
        """Called exactly once, after the last delivery: Closed or Broken or WireError."""
        ...


class Link(abc.ABC):
    """A handshaken, ordered, credit-bounded connection to one peer."""

    local: Hello
    remote: Hello
    options: LinkOptions
    peer_key: str | None = None  # the public key that the peer has proven to own; None where no keys are used

    @abc.abstractmethod
    def start(self, receiver: Receiver) -> None:
        """Begin to deliver. Messages that arrived before are kept (they are bounded by the window) and delivered first."""

    @abc.abstractmethod
    async def send(self, frames: Sequence[Buffer], *, timeout_s: float) -> None:
        """Send in the data lane; returns when the message is handed to the transport.

        The caller must not change the frames' bytes afterwards. Raises Timeout when no credit came within `timeout_s`,
        Closed, Broken, Invalid (too many frames, or one too large).
        """

    @abc.abstractmethod
    def try_send(self, frames: Sequence[Buffer]) -> None:
        """Like `send`, but raises Busy instead of waiting for a credit."""

    @abc.abstractmethod
    def send_control(self, frames: Sequence[Buffer]) -> None:
        """Send in the control lane, at once. Raises Busy when its bounded buffer is full, Closed, Broken, Invalid."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Tell the peer, flush for at most a second, release everything. Idempotent. Waiting senders get Closed."""

    @abc.abstractmethod
    def abort(self, error: AsyncPipeError) -> None:
        """End the link now with `error`: its peer is known to be gone, from elsewhere (its process was reaped, say)."""

    @property
    @abc.abstractmethod
    def is_open(self) -> bool: ...

    @abc.abstractmethod
    def statistics(self) -> LinkStatistics: ...


AcceptHandler = Callable[[Link], None]


class Listener(abc.ABC):
    """A bound address. Each peer whose Hello is acceptable becomes a Link given to the accept handler."""

    address: str  # as a peer would connect to it, with the real port

    @abc.abstractmethod
    async def close(self) -> None:
        """Stop accepting and close every accepted link. Idempotent."""


class Transport(abc.ABC):
    """An address scheme."""

    schemes: frozenset[str]

    @abc.abstractmethod
    async def listen(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> Listener:
        """Bind `address`. Raises Invalid for one that is bad, in use, or open to others without keys (one clear line)."""

    @abc.abstractmethod
    async def connect(self, address: str, *, hello: Hello, options: LinkOptions) -> Link:
        """Connect and shake hands within `options.handshake_s`. Raises Timeout, Refused, WireError, Invalid."""


def address_in_use(address: str) -> Invalid:
    """To be raised by `listen`."""
    hint = "choose another port or 0" if address.startswith("tcp://") else "choose another name"
    return Invalid(f"{address} is already in use; {hint}")
