"""`inproc://`, `ipc://` and `tcp://` over ZeroMQ: a listener is a ROUTER, each connector a DEALER.

Every message starts with a five-byte frame, kind and value (`credit.Kind`), followed by the frames of the message. ZeroMQ hides
that a peer has gone, so links say "I am here" when they have nothing else to say, and one that hears nothing for `silence_s` is
broken. A connector also watches its socket's own events and notices a dead listener at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from asyncpipe.errors import AsyncPipeError, Broken, Busy, Invalid, Refused, Timeout, WireError
from asyncpipe.transport.base import AcceptHandler, LinkOptions, Listener, Transport
from asyncpipe.transport.credit import CreditedLink, Kind
from asyncpipe.transport.zmq_socket import LINGER_MS, LoopSocket
from asyncpipe.wire.handshake import (
    Hello,
    check_hello,
    decode_hello,
    decode_refusal,
    encode_hello,
    encode_refusal,
)
from asyncpipe.wire.tensors import Buffer

HEADER = struct.Struct("<BI")
MAX_LINKS = 4096  # of one listener
LOOPBACK_HOSTS = ("127.", "localhost", "[::1]", "::1")

log = logging.getLogger(__name__)

Out = Callable[[list[Buffer]], None]


class ZmqLink(CreditedLink):
    """A link over somebody's socket: `out` sends to the peer, `forget` is called at the end."""

    def __init__(self, *, local: Hello, remote: Hello, options: LinkOptions, out: Out, forget: Callable[[], None]) -> None:
        super().__init__(local=local, remote=remote, options=options)
        self._out = out
        self._forget = forget
        self._heard_at_s = self._loop.time()
        self._has_sent = False

    def on_message(self, header: Buffer, frames: Sequence[Buffer]) -> None:
        self._heard_at_s = self._loop.time()
        kind, value = HEADER.unpack(header) if len(header) == HEADER.size else (0, 0)
        self._arrived(kind, value, frames)

    def on_disconnected(self) -> None:
        self._finish(Broken(f"{self.remote.role} {self.remote.node} is gone: its connection ended"))

    def beat(self, now_s: float, *, forgive: bool) -> None:
        """Called every `heartbeat_s`. `forgive`: this loop itself was away, so the peer's silence says nothing."""
        if forgive:
            self._heard_at_s = now_s
        if now_s - self._heard_at_s > self.options.silence_s:
            self._finish(Broken(f"{self.remote.role} {self.remote.node} has been silent for {now_s - self._heard_at_s:.1f} s"))
        elif not self._has_sent:
            with contextlib.suppress(Busy):
                self._try_ping()
        self._has_sent = False

    def _try_ping(self) -> None:
        try:
            self._transmit(Kind.PING)
        except Broken as error:
            self._finish(error)

    def _transmit(self, kind: Kind, *, value: int = 0, frames: Sequence[Buffer] = ()) -> None:
        self._out([HEADER.pack(kind, value), *frames])
        self._has_sent = True

    def _release(self) -> None:
        self._forget()


class Heart:
    """Beats for all links of a socket."""

    def __init__(self, links: Callable[[], Iterable[ZmqLink]], *, period_s: float) -> None:
        self._links = links
        self._period_s = period_s
        self._loop = asyncio.get_running_loop()
        self._due_s = self._loop.time() + period_s
        self._timer = self._loop.call_later(period_s, self._beat)

    def stop(self) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        now_s = self._loop.time()
        was_away = now_s - self._due_s > self._period_s
        for link in list(self._links()):
            link.beat(now_s, forgive=was_away)
        self._due_s = now_s + self._period_s
        self._timer = self._loop.call_later(self._period_s, self._beat)


class ZmqListener(Listener):
    def __init__(
        self, socket: zmq.Socket[bytes], address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions
    ) -> None:
        self.address = address
        self._hello = hello
        self._on_link = on_link
        self._options = options
        self._links: dict[bytes, ZmqLink] = {}
        self._socket = LoopSocket(socket, self._on_message)
        self._heart = Heart(lambda: self._links.values(), period_s=options.heartbeat_s)

    async def close(self) -> None:
        if not self._socket.is_open:
            return
        self._heart.stop()
        for link in list(self._links.values()):
            await link.close()
        self._socket.close()
        _remove_socket_file(self.address)

    def _on_message(self, parts: list[Buffer]) -> None:
        identity, rest = bytes(parts[0]), parts[1:]
        link = self._links.get(identity)
        if link is not None and rest:
            link.on_message(rest[0], rest[1:])
        elif rest and bytes(rest[0]) == HEADER.pack(Kind.HELLO, 0):
            self._on_hello(identity, rest[1:])
        elif rest and len(rest[0]) == HEADER.size and rest[0][0] in (Kind.BYE, Kind.PING):
            pass  # the last words of a link that has ended here
        else:
            self._refuse(identity, "say Hello first")

    def _on_hello(self, identity: bytes, frames: Sequence[Buffer]) -> None:
        try:
            if len(frames) != 1:
                raise WireError("a Hello is one frame")
            if len(self._links) >= MAX_LINKS:
                raise Refused(f"{MAX_LINKS} peers are connected already")
            remote = decode_hello(bytes(frames[0]))
            check_hello(remote, token=self._hello.token)
        except (Refused, WireError) as error:
            log.warning("refused a peer at %s: %s", self.address, error)
            self._refuse(identity, str(error))
            return
        self._accept(identity, remote)

    def _accept(self, identity: bytes, remote: Hello) -> None:
        link = ZmqLink(
            local=self._hello,
            remote=remote,
            options=self._options,
            out=lambda parts: self._socket.send([identity, *parts]),
            forget=lambda: self._links.pop(identity, None) and None,
        )
        try:
            self._socket.send([identity, HEADER.pack(Kind.WELCOME, 0), encode_hello(self._hello)])
        except AsyncPipeError as error:
            log.info("a peer at %s left during its handshake: %s", self.address, error)
            return
        self._links[identity] = link
        self._on_link(link)

    def _refuse(self, identity: bytes, reason: str) -> None:
        with contextlib.suppress(AsyncPipeError):  # it may have left already
            self._socket.send([identity, HEADER.pack(Kind.REFUSE, 0), encode_refusal(reason)])


class _Connector:
    """The DEALER side: one socket, one link."""

    def __init__(self, address: str, *, hello: Hello, options: LinkOptions) -> None:
        self._address = address
        self._hello = hello
        self._options = options
        self._link: ZmqLink | None = None
        self._answer: asyncio.Future[ZmqLink] = asyncio.get_running_loop().create_future()
        socket = _make_socket(zmq.DEALER, options)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise Invalid(f"cannot connect to {address}: {error.strerror}") from None
        # The monitor comes first: its events must not miss the connection's end.
        self._monitor = LoopSocket(socket.get_monitor_socket(zmq.EVENT_DISCONNECTED), self._on_event)
        self._socket = LoopSocket(socket, self._on_message)
        self._heart: Heart | None = None

    async def handshake(self) -> ZmqLink:
        try:
            self._socket.send([HEADER.pack(Kind.HELLO, 0), encode_hello(self._hello)])
            async with asyncio.timeout(self._options.handshake_s):
                return await self._answer
        except TimeoutError:
            self.close()
            raise Timeout(f"nobody answered at {self._address} within {self._options.handshake_s:g} s") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._heart is not None:
            self._heart.stop()
        if self._socket.is_open:
            self._socket.raw.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def _on_message(self, parts: list[Buffer]) -> None:
        if self._link is not None:
            self._link.on_message(parts[0], parts[1:])
        elif not self._answer.done():
            try:
                self._answer.set_result(self._welcomed(parts))
            except AsyncPipeError as error:
                self._answer.set_exception(error)

    def _welcomed(self, parts: list[Buffer]) -> ZmqLink:
        kind, body = bytes(parts[0]), bytes(parts[1]) if len(parts) == 2 else b""
        if kind == HEADER.pack(Kind.REFUSE, 0):
            raise Refused(f"{self._address} refused: {decode_refusal(body)}")
        if kind != HEADER.pack(Kind.WELCOME, 0):
            raise WireError(f"{self._address} does not speak this protocol")
        remote = decode_hello(body)
        self._link = link = ZmqLink(
            local=self._hello, remote=remote, options=self._options, out=self._socket.send, forget=self.close
        )
        self._heart = Heart(lambda: (link,), period_s=self._options.heartbeat_s)
        return link

    def _on_event(self, parts: list[Buffer]) -> None:
        event = parse_monitor_message([bytes(part) for part in parts])
        if event["event"] == zmq.EVENT_DISCONNECTED and self._link is not None:
            self._link.on_disconnected()


class ZmqTransport(Transport):
    schemes = frozenset({"inproc", "ipc", "tcp"})

    async def listen(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> Listener:
        _check_may_bind(address)
        socket = _make_socket(zmq.ROUTER, options)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            _bind(socket, address)
        except BaseException:
            socket.close(linger=0)
            raise
        real_address = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        return ZmqListener(socket, real_address, hello=hello, on_link=on_link, options=options)

    async def connect(self, address: str, *, hello: Hello, options: LinkOptions) -> ZmqLink:
        return await _Connector(address, hello=hello, options=options).handshake()


def _make_socket(kind: int, options: LinkOptions) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(kind)
    high_water_mark = options.window + options.control_window + 64
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    socket.setsockopt(zmq.MAXMSGSIZE, options.max_frame_bytes)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    return socket


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            hint = "choose another port, or 0 for a free one" if address.startswith("tcp://") else "choose another name"
            raise Invalid(f"{address} is already in use; {hint}") from None
        raise Invalid(f"cannot listen at {address}: {error.strerror}") from None


def _check_may_bind(address: str) -> None:
    """Keys are not spoken yet, so nothing but this machine may reach us."""
    scheme, _, host = address.partition("://")
    if scheme == "tcp" and not host.startswith(LOOPBACK_HOSTS):
        raise Invalid(f"{address} is reachable from other machines, which needs keys; use tcp://127.0.0.1:PORT")


def _remove_socket_file(address: str) -> None:
    """`ipc://@name` is Linux's abstract namespace and has no file; `ipc://path` has one."""
    path = address.removeprefix("ipc://")
    if address.startswith("ipc://") and not path.startswith("@"):
        with contextlib.suppress(OSError):
            Path(path).unlink()
