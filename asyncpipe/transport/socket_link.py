"""One peer over somebody's socket, and the heartbeat by which a silent one is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from asyncpipe.errors import AsyncPipeError, Broken, WireError
from asyncpipe.transport.base import LinkOptions
from asyncpipe.transport.credit import CreditedLink, Kind, offer
from asyncpipe.transport.shm import Arena, PeerMemory, Placed, proof, verified_pid
from asyncpipe.wire.handshake import Hello
from asyncpipe.wire.tensors import Buffer

HEADER = struct.Struct("<BI")
SPARE_MESSAGES = 256  # room for our own short messages beside a full window in both lanes

Out = Callable[[list[Buffer]], None]


class SocketLink(CreditedLink):
    """A link over somebody's socket: `out` sends to the peer, `forget` is called at the end."""

    def __init__(
        self,
        *,
        local: Hello,
        remote: Hello,
        options: LinkOptions,
        out: Out,
        receive_all: Callable[[], None],
        forget: Callable[[], None],
        peer_key: str | None = None,
    ) -> None:
        super().__init__(local=local, remote=remote, options=options)
        self.peer_key = peer_key
        self._out = out
        self._receive_all = receive_all
        self._forget = forget
        self._heard_at_s = self._loop.time()
        self._has_sent = False
        self._owed: deque[tuple[Kind, int]] = deque()  # short messages that the peer must get, sooner or later
        self._arena: Arena | None = None  # where our large frames lie, once the peer has said that it can read it
        self._peer_memory: PeerMemory | None = None
        self._num_shared_bytes = 0

    def share_memory(self) -> None:
        """Tell the peer that its memory can be read from here, if so. Called once, when both Hellos are sent."""
        if self.local.shm and (pid := verified_pid(self.remote.shm)) is not None:
            self._peer_memory = PeerMemory(pid, self._on_region_unused, max_frames=self.options.max_frames)
            self._owe(Kind.SHARED, 1)

    def on_message(self, header: Buffer, frames: Sequence[Buffer]) -> None:
        """A message from the peer; a malformed header is unknown kind 0."""
        self._heard_at_s = self._loop.time()
        kind, value = HEADER.unpack(header) if len(header) == HEADER.size else (0, 0)
        self._arrived(kind, value, frames)

    def on_disconnected(self, error: WireError | None = None) -> None:
        """The peer's connection ended, and all that came over it has been handed over; `error`: what cannot be understood."""
        if error is not None:
            self._refuse(WireError(f"{self._peer} sent {error}"))
        else:
            self._finish(Broken(f"{self._peer} is gone: its connection ended"))

    def beat(self, now_s: float, *, forgive: bool) -> None:
        """Called every `heartbeat_s`. `forgive`: this loop itself was away, so the peer's silence says nothing."""
        if forgive:
            self._heard_at_s = now_s
        silent_s = now_s - self._heard_at_s
        if silent_s > self.options.silence_s:
            return self._finish(Broken(f"{self._peer} has been silent for {silent_s:.1f} s"))
        self._grant()
        self._pay()
        if not self._has_sent:
            with contextlib.suppress(AsyncPipeError):
                self._put(Kind.PING)
        self._has_sent = False
        return None

    # --- CreditedLink ---

    def _transmit(self, kind: Kind, *, value: int = 0, frames: Sequence[Buffer] = ()) -> None:
        shared_kind = _SHARED_KIND_OF.get(kind)
        placed = self._arena.place(frames) if self._arena is not None and shared_kind is not None else None
        if placed is not None and shared_kind is not None:
            self._transmit_placed(shared_kind, placed)
        else:
            self._out([HEADER.pack(kind, value), *frames])
        self._has_sent = True

    def _on_unreachable(self, error: Broken) -> None:
        """A peer that has left may have said something first, which has arrived and is not read yet."""
        self._loop.call_soon(self._finish_after_reading, error)

    def _finish_after_reading(self, error: Broken) -> None:
        if self.is_open:
            self._receive_all()
            self._finish(error)

    def _dispatch(self, kind: int, value: int, frames: Sequence[Buffer]) -> None:
        match kind:
            case Kind.SHARED_DATA | Kind.SHARED_CONTROL if self._peer_memory is not None:
                super()._dispatch(_PLAIN_KIND_OF[kind], value, self._peer_memory.frames(frames))
            case Kind.SHARED if self.local.shm and self._arena is None:
                self._arena = Arena(lambda fd: self._out([HEADER.pack(Kind.SEGMENT, fd)]))
            case Kind.SEGMENT if self._peer_memory is not None:
                self._owe(Kind.MAPPED, int(self._peer_memory.map(value)))
            case Kind.MAPPED if self._arena is not None:
                self._arena.on_mapped(succeeded=value == 1)
            case Kind.RELEASE if self._arena is not None:
                self._arena.free(value)
            case _:
                super()._dispatch(kind, value, frames)

    def _release(self) -> None:
        self._owed.clear()
        if self._arena is not None:
            self._arena.close()
        if self._peer_memory is not None:
            self._peer_memory.close()
        self._forget()

    def _shared_memory_bytes(self) -> int:
        return self._num_shared_bytes

    # --- shared memory ---

    def _transmit_placed(self, kind: Kind, placed: Placed) -> None:
        assert self._arena is not None  # noqa: S101 - it is what placed them
        try:
            self._out([HEADER.pack(kind, 0), placed.table, *placed.inline])
        except AsyncPipeError:
            for entry in placed.entries:
                self._arena.free(entry.region)
            raise
        self._num_shared_bytes += sum(entry.size for entry in placed.entries)

    def _on_region_unused(self, region: int) -> None:
        self._owe(Kind.RELEASE, region)

    def _owe(self, kind: Kind, value: int) -> None:
        self._owed.append((kind, value))
        self._pay()

    def _pay(self) -> None:
        """Send what is owed, in order; what finds no room now is sent with the next beat."""
        with contextlib.suppress(AsyncPipeError):
            while self._owed and self.is_open:
                kind, value = self._owed[0]
                self._put(kind, value=value)
                self._owed.popleft()


_SHARED_KIND_OF = {Kind.DATA: Kind.SHARED_DATA, Kind.CONTROL: Kind.SHARED_CONTROL}
_PLAIN_KIND_OF: dict[int, Kind] = {shared: plain for plain, shared in _SHARED_KIND_OF.items()}


class Heart:
    """Beats for all links of a socket."""

    def __init__(self, links: Callable[[], Iterable[SocketLink]], *, period_s: float) -> None:
        self._links = links
        self._period_s = period_s
        self._loop = asyncio.get_running_loop()
        self._due_s = self._loop.time() + period_s
        self._timer = self._loop.call_later(period_s, self._beat)
        self._is_stopped = False

    def stop(self) -> None:
        self._is_stopped = True
        self._timer.cancel()

    def _beat(self) -> None:
        now_s = self._loop.time()
        was_away = now_s - self._due_s > self._period_s
        for link in list(self._links()):
            link.beat(now_s, forgive=was_away)
        if not self._is_stopped:  # by the end of its last link
            self._due_s = now_s + self._period_s
            self._timer = self._loop.call_later(self._period_s, self._beat)


def offered(hello: Hello, options: LinkOptions, *, shares_memory: bool = True) -> Hello:
    """What this end says of itself."""
    return replace(offer(hello, options), shm=proof() if shares_memory and options.shared_memory else "")


def max_on_the_way(options: LinkOptions) -> int:
    """Messages to one peer that its socket holds."""
    return options.window + options.control_window + SPARE_MESSAGES


def header_kind(header: Buffer) -> int:
    """The kind of a message from a stranger, 0 when it has none."""
    return HEADER.unpack(header)[0] if len(header) == HEADER.size else 0


def plain(kind: Kind) -> bytes:
    """The header of a message without a value."""
    return HEADER.pack(kind, 0)


def only_frame(frames: Sequence[Buffer]) -> Buffer:
    """The one frame of a message of the handshake. Raises WireError."""
    if len(frames) != 1:
        raise WireError(f"one frame was expected, not {len(frames)}")
    return frames[0]
