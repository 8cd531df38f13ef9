"""`inproc://`, `ipc://` and `tcp://` over ZeroMQ: a listener is a ROUTER, each connector a DEALER.

Every message starts with a five-byte frame, kind and value (`credit.Kind`), followed by the frames of the message. ZeroMQ
hides that a peer has gone, so links say "I am here" when they have nothing else to say, and one that hears nothing for
`silence_s` is broken. A connector also watches its socket's own events and notices a dead listener at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace

import zmq
from zmq.utils.monitor import parse_monitor_message

from asyncpipe.errors import AsyncPipeError, Invalid, Refused, Timeout, WireError
from asyncpipe.transport.base import AcceptHandler, LinkOptions, Listener, Transport
from asyncpipe.transport.credit import Kind, offer
from asyncpipe.transport.shm import proof
from asyncpipe.transport.zmq_address import bind, check_port, remove_socket_file
from asyncpipe.transport.zmq_link import Heart, ZmqLink, header_kind, only_frame, plain
from asyncpipe.transport.zmq_socket import LINGER_MS, LoopSocket, context
from asyncpipe.wire.handshake import Hello, check_hello, decode_hello, decode_refusal, encode_hello, encode_refusal
from asyncpipe.wire.tensors import Buffer

MAX_LINKS = 4096  # of one listener
SPARE_MESSAGES = 256  # room for our own short messages beside a full window in both lanes
RECONNECT_MS = 50  # while the listener is not there yet; a link that has been up never reconnects

log = logging.getLogger(__name__)


class ZmqListener(Listener):
    """A bound ROUTER and the links over it, by routing id."""

    def __init__(
        self, socket: zmq.Socket[bytes], address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions
    ) -> None:
        self.address = address
        self._hello = _offer(address, hello, options)
        self._on_link = on_link
        self._options = options
        self._links: dict[bytes, ZmqLink] = {}
        self._socket = LoopSocket(socket, self._on_message)
        self._heart = Heart(self._links.values, period_s=options.heartbeat_s)

    async def close(self) -> None:
        if not self._socket.is_open:
            return
        self._heart.stop()
        for link in list(self._links.values()):
            await link.close()
        self._socket.close()
        remove_socket_file(self.address)

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
        try:
            if len(self._links) >= MAX_LINKS:
                raise Refused(f"{MAX_LINKS} peers are connected already")
            remote = decode_hello(bytes(only_frame(frames)))
            check_hello(remote, token=self._hello.token)
        except (Refused, WireError) as error:
            log.warning("refused a peer at %s: %s", self.address, error)
            self._refuse(identity, str(error))
        else:
            self._accept(identity, remote)

    def _accept(self, identity: bytes, remote: Hello) -> None:
        try:
            self._socket.send([identity, plain(Kind.WELCOME), encode_hello(self._hello)])
        except AsyncPipeError as error:
            log.info("a peer at %s left during its handshake: %s", self.address, error)
            return
        link = self._links[identity] = ZmqLink(
            local=self._hello,
            remote=remote,
            options=self._options,
            out=lambda parts: self._socket.send([identity, *parts]),
            receive_all=self._socket.receive_all,
            forget=lambda: self._forget(identity),
        )
        link.share_memory()
        self._on_link(link)

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
        self._link: ZmqLink | None = None
        self._heart: Heart | None = None
        self._answer: asyncio.Future[ZmqLink] = asyncio.get_running_loop().create_future()
        check_port(address)
        socket = _make_socket(zmq.DEALER, options, address)
        # The monitor comes first: its events must not miss the connection's end.
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)
            raise Invalid(f"cannot connect to {address}: {error.strerror}") from None
        self._monitor = LoopSocket(monitor, self._on_event)
        self._socket = LoopSocket(socket, self._on_message)

    async def handshake(self) -> ZmqLink:
        """Raises Timeout, Refused, WireError; then nothing is left open."""
        try:
            self._socket.send([plain(Kind.HELLO), encode_hello(self._hello)])
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
            # In this order: ZeroMQ would wait for ever to tell a closed monitor of a last event.
            self._socket.raw.disable_monitor()
            self._monitor.close(linger_ms=0)
            self._socket.close(linger_ms=LINGER_MS if self._link is not None else 0)

    def _on_message(self, parts: list[Buffer]) -> None:
        if self._link is not None:
            self._link.on_message(parts[0], parts[1:])
        elif not self._answer.done():
            try:
                self._answer.set_result(self._welcomed(parts))
            except AsyncPipeError as error:
                self._answer.set_exception(error)

    def _welcomed(self, parts: list[Buffer]) -> ZmqLink:
        kind = header_kind(parts[0])
        if kind == Kind.REFUSE:
            raise Refused(f"{self._address} refused: {decode_refusal(bytes(only_frame(parts[1:])))}")
        if kind != Kind.WELCOME:
            raise WireError(f"{self._address} does not speak this protocol")
        self._link = link = ZmqLink(
            local=self._hello,
            remote=decode_hello(bytes(only_frame(parts[1:]))),
            options=self._options,
            out=self._socket.send,
            receive_all=self._socket.receive_all,
            forget=self.close,
        )
        self._heart = Heart(lambda: (link,), period_s=self._options.heartbeat_s)
        link.share_memory()
        return link

    def _on_event(self, parts: list[Buffer]) -> None:
        event = parse_monitor_message([bytes(part) for part in parts])
        if event["event"] == zmq.EVENT_DISCONNECTED and self._link is not None:
            self._socket.receive_all()  # its last words, and why it left
            self._link.on_disconnected()


class ZmqTransport(Transport):
    """`inproc`, `ipc` and `tcp`."""

    schemes = frozenset({"inproc", "ipc", "tcp"})

    async def listen(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> Listener:
        socket = _make_socket(zmq.ROUTER, options, address)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            real_address = bind(socket, address)
        except BaseException:
            socket.close(linger=0)
            raise
        return ZmqListener(socket, real_address, hello=hello, on_link=on_link, options=options)

    async def connect(self, address: str, *, hello: Hello, options: LinkOptions) -> ZmqLink:
        return await _Connector(address, hello=hello, options=options).handshake()


def _offer(address: str, hello: Hello, options: LinkOptions) -> Hello:
    """Within one process, ZeroMQ hands frames over by reference already."""
    shares_memory = options.shared_memory and not address.startswith("inproc://")
    return replace(offer(hello, options), shm=proof() if shares_memory else "")


def _make_socket(kind: int, options: LinkOptions, address: str) -> zmq.Socket[bytes]:
    socket = context().socket(kind)
    high_water_mark = options.window + options.control_window + SPARE_MESSAGES
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    socket.setsockopt(zmq.MAXMSGSIZE, options.max_frame_bytes)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    return socket
