"""`inproc://` and `tcp://` over ZeroMQ: a listener is a ROUTER, each connector a DEALER.

Every message starts with a five-byte frame, kind and value (`credit.Kind`), followed by the frames of the message. ZeroMQ
hides that a peer has gone, so links say "I am here" when they have nothing else to say, and one that hears nothing for
`silence_s` is broken. A connector also watches its socket's own events and notices a dead listener at once.

`tcp://` with keys is CURVE (see `curve`); without keys it is plain, and bound for this machine only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Container, Sequence

import zmq

from asyncpipe.errors import AsyncPipeError, Busy, Invalid, Refused, Timeout, WireError
from asyncpipe.transport.base import AcceptHandler, LinkOptions, Listener, Transport
from asyncpipe.transport.credit import Kind
from asyncpipe.transport.curve import CURVE_BYTES, HANDSHAKE_FAILED, FailedHandshakes, Gate, curve_client, keys_for
from asyncpipe.transport.refusals import RefusalLog
from asyncpipe.transport.socket_link import Heart, SocketLink, header_kind, max_on_the_way, offered, only_frame, plain
from asyncpipe.transport.zmq_address import bind, check_port
from asyncpipe.transport.zmq_socket import LINGER_MS, LoopSocket, Monitor, RouterSocket, context
from asyncpipe.wire.handshake import Hello, check_hello, decode_hello, decode_refusal, encode_hello, encode_refusal
from asyncpipe.wire.tensors import Buffer

MAX_LINKS = 4096  # of one listener
RECONNECT_MS = 50  # while the listener is not there yet; a link that has been up never reconnects

log = logging.getLogger(__name__)


class ZmqListener(Listener):
    """A bound ROUTER and the links over it, by routing id."""

    def __init__(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> None:
        self._hello = _offer(address, hello, options)
        self._on_link = on_link
        self._options = options
        self._links: dict[bytes, SocketLink] = {}
        self._gate: Gate | None = None
        socket = _make_socket(zmq.ROUTER, options, address)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            if keys := keys_for(address, options):
                self._gate = Gate(socket, keys, self._on_refused)
            self.address = bind(socket, address, options)
        except BaseException:
            self._close_gate()
            socket.close(linger=0)
            raise
        self._refusals = RefusalLog(self.address)
        self._socket = RouterSocket(socket, self._on_keyed_message) if self._gate else LoopSocket(socket, self._on_message)
        self._heart = Heart(self._links.values, period_s=options.heartbeat_s)

    async def close(self) -> None:
        if not self._socket.is_open:
            return
        self._heart.stop()
        for link in list(self._links.values()):
            await link.close()
        self._close_gate()
        self._socket.close()

    def _close_gate(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def _on_keyed_message(self, parts: list[Buffer]) -> None:
        """A peer may choose its routing id, even that of a link whose own peer has gone a moment ago."""
        key = self._socket.key_at_hand()
        link = self._links.get(bytes(parts[0]))
        if link is None or link.peer_key == key:
            self._on_message(parts)
        else:
            self._on_refused(f"it spoke as {link.remote.role} {link.remote.node}, whose key is another (key {key})")

    def _on_message(self, parts: list[Buffer]) -> None:
        identity, rest = bytes(parts[0]), parts[1:]
        link = self._links.get(identity)
        if link is not None:
            link.on_message(rest[0] if rest else b"", rest[1:])
        else:
            self._on_stranger(identity, rest)

    def _on_stranger(self, identity: bytes, parts: Sequence[Buffer]) -> None:
        match header_kind(parts[0]) if parts else 0:
            case Kind.HELLO:
                self._on_hello(identity, parts[1:])
            case Kind.BYE | Kind.REFUSE:
                pass  # the last words of a link that has ended here
            case _:
                self._refuse(identity, "say Hello first")

    def _on_hello(self, identity: bytes, frames: Sequence[Buffer]) -> None:
        key = self._socket.key_at_hand()
        try:
            if len(self._links) >= MAX_LINKS:
                raise Refused(f"{MAX_LINKS} peers are connected already")
            remote = decode_hello(bytes(only_frame(frames)))
            check_hello(remote, token=self._hello.token, roles=self._roles_of(key))
        except (Refused, WireError) as error:
            self._on_refused(str(error) if key is None else f"{error} (key {key})")
            self._refuse(identity, str(error))
        else:
            self._accept(identity, remote, key)

    def _roles_of(self, key: str | None) -> Container[str] | None:
        return None if self._gate is None else self._gate.roles_of(key or "")

    def _accept(self, identity: bytes, remote: Hello, key: str | None) -> None:
        try:
            self._socket.send([identity, plain(Kind.WELCOME), encode_hello(self._hello)])
        except AsyncPipeError as error:
            log.info("a peer at %s left during its handshake: %s", self.address, error)
            return
        link = self._links[identity] = SocketLink(
            local=self._hello,
            remote=remote,
            options=self._options,
            out=lambda parts: self._socket.send([identity, *parts]),
            receive_all=self._socket.receive_all,
            forget=lambda: self._forget(identity),
            peer_key=key,
        )
        link.share_memory()
        self._on_link(link)

    def _on_refused(self, reason: str) -> None:
        self._refusals.refused(reason)

    def _forget(self, identity: bytes) -> None:
        self._links.pop(identity, None)

    def _refuse(self, identity: bytes, reason: str) -> None:
        with contextlib.suppress(AsyncPipeError):  # it may have left already
            self._socket.send([identity, plain(Kind.REFUSE), encode_refusal(reason)])


class _Connector:
    """The DEALER side: one socket, one link."""

    def __init__(self, address: str, *, hello: Hello, options: LinkOptions) -> None:
        self._address = address
        self._hello = _offer(address, hello, options)
        self._options = options
        self._link: SocketLink | None = None
        self._heart: Heart | None = None
        self._answer: asyncio.Future[SocketLink] = asyncio.get_running_loop().create_future()
        self._is_heard = False  # by somebody who speaks ZeroMQ and has not answered yet
        check_port(address)
        self._client = curve_client(address, options)
        self._failures = FailedHandshakes(address, self._client)
        socket = _make_socket(zmq.DEALER, options, address)
        if self._client is not None:
            self._client.prepare(socket)
        # The monitor comes first: its events must not miss the connection's end.
        watched = int(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED) | HANDSHAKE_FAILED
        self._monitor = Monitor(socket, watched, self._on_event)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            self._monitor.close()
            socket.close(linger=0)
            raise Invalid(f"cannot connect to {address}: {error.strerror}") from None
        self._socket = LoopSocket(socket, self._on_message)

    async def handshake(self) -> SocketLink:
        """Raises Timeout, Refused, WireError; then nothing is left open."""
        try:
            self._say_hello()
            async with asyncio.timeout(self._options.handshake_s):
                return await self._answer
        except TimeoutError:
            self.close()
            waited = f"nobody answered at {self._address} within {self._options.handshake_s:g} s"
            raise Timeout(waited + self._failures.hint()) from None
        except BaseException:
            self.close()
            raise

    def _say_hello(self) -> None:
        with contextlib.suppress(Busy):  # ZeroMQ has given up on this listener already; the monitor tells why
            self._socket.send([plain(Kind.HELLO), encode_hello(self._hello)])

    def close(self) -> None:
        if self._heart is not None:
            self._heart.stop()
        if self._socket.is_open:
            self._monitor.close()
            self._socket.close(linger_ms=LINGER_MS if self._link is not None else 0)

    def _on_message(self, parts: list[Buffer]) -> None:
        if self._link is not None:
            self._link.on_message(parts[0], parts[1:])
        elif not self._answer.done():
            try:
                self._answer.set_result(self._welcomed(parts))
            except AsyncPipeError as error:
                self._answer.set_exception(error)

    def _welcomed(self, parts: list[Buffer]) -> SocketLink:
        kind = header_kind(parts[0])
        if kind == Kind.REFUSE:
            raise Refused(f"{self._address} refused: {decode_refusal(bytes(only_frame(parts[1:])))}")
        if kind != Kind.WELCOME:
            raise WireError(f"{self._address} does not speak this protocol")
        self._link = link = SocketLink(
            local=self._hello,
            remote=decode_hello(bytes(only_frame(parts[1:]))),
            options=self._options,
            out=self._socket.send,
            receive_all=self._socket.receive_all,
            forget=self.close,
            peer_key=None if self._client is None else self._client.listener,
        )
        self._heart = Heart(lambda: (link,), period_s=self._options.heartbeat_s)
        link.share_memory()
        return link

    def _on_event(self, event: int, detail: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_heard = True
        elif event != zmq.EVENT_DISCONNECTED:
            self._on_failed_handshake(event, detail)
        elif self._link is not None:
            self._socket.receive_all()  # its last words, and why it left
            self._link.on_disconnected()
        elif self._is_heard and not self._answer.done():  # by one that was about to close: there may be another in its place
            self._is_heard = False
            self._say_hello()

    def _on_failed_handshake(self, event: int, detail: int) -> None:
        error = self._failures.error(event, detail)
        if error is not None and not self._answer.done():
            self._answer.set_exception(error)


class ZmqTransport(Transport):
    """`inproc` and `tcp`."""

    schemes = frozenset({"inproc", "tcp"})

    async def listen(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> Listener:
        return ZmqListener(address, hello=hello, on_link=on_link, options=options)

    async def connect(self, address: str, *, hello: Hello, options: LinkOptions) -> SocketLink:
        return await _Connector(address, hello=hello, options=options).handshake()


def _offer(address: str, hello: Hello, options: LinkOptions) -> Hello:
    """Within one process, ZeroMQ hands frames over by reference already."""
    return offered(hello, options, shares_memory=not address.startswith("inproc://"))


def _make_socket(kind: int, options: LinkOptions, address: str) -> zmq.Socket[bytes]:
    socket = context().socket(kind)
    socket.setsockopt(zmq.SNDHWM, max_on_the_way(options))
    socket.setsockopt(zmq.RCVHWM, max_on_the_way(options))
    socket.setsockopt(zmq.MAXMSGSIZE, options.max_frame_bytes + (CURVE_BYTES if keys_for(address, options) else 0))
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, max(1, int(options.handshake_s * 1000)))
    socket.setsockopt(zmq.IPV6, int("[" in address))
    return socket
