"""`ipc://`: Unix-domain stream sockets on the event loop, for peers on one machine.

Messages have the frames that they have over ZeroMQ, kind and value first, and `framing` says where each ends. What is sent
wakes the peer's loop, and no other thread. That a peer has ended its connection tells at once; that it is frozen, its silence.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence

from asyncpipe.errors import AsyncPipeError, Broken, Refused, Timeout, WireError
from asyncpipe.transport.base import AcceptHandler, LinkOptions, Listener, Transport
from asyncpipe.transport.credit import Kind
from asyncpipe.transport.framing import MessageReader
from asyncpipe.transport.refusals import RefusalLog
from asyncpipe.transport.socket_link import Heart, SocketLink, header_kind, max_on_the_way, offered, only_frame, plain
from asyncpipe.transport.stream_socket import StreamSocket
from asyncpipe.transport.unix_address import connected, listening, remove_socket_file
from asyncpipe.wire.handshake import (
    MAX_HELLO_BYTES,
    Hello,
    check_hello,
    decode_hello,
    decode_refusal,
    encode_hello,
    encode_refusal,
)
from asyncpipe.wire.tensors import Buffer

MAX_CONNECTIONS = 4096  # of one listener
ACCEPTS_PER_TURN = 64
RETRY_S = 0.05  # while the listener is not there yet, or no descriptor is left to accept with
LINGER_S = 1.0
NEWS_S = 0.25  # for whoever has started the process at the other end to hear how that has ended, and say so
HELLO_FRAMES = 2  # the header, and what is said

log = logging.getLogger(__name__)


class UnixLink(SocketLink):
    """One that is closed has said goodbye, unless the peer took no notice for a second."""

    def __init__(
        self, stream: StreamSocket, *, local: Hello, remote: Hello, options: LinkOptions, forget: Callable[[], None]
    ) -> None:
        super().__init__(
            local=local, remote=remote, options=options, out=stream.send, receive_all=stream.receive_all, forget=forget
        )
        self._stream = stream

    async def close(self) -> None:
        await super().close()
        await self._stream.flushed()

    def _on_unreachable(self, error: Broken) -> None:
        """The end of its connection is there to be read, after what it has said last."""


class _Connection(abc.ABC):
    """A connected socket, and the link over it from when the peer has said Hello."""

    def __init__(self, connection: socket.socket, *, local: Hello, options: LinkOptions) -> None:
        self.link: UnixLink | None = None
        self._local = local
        self._options = options
        self._stream = StreamSocket(
            connection,
            reader=MessageReader(max_frames=HELLO_FRAMES, max_frame_bytes=MAX_HELLO_BYTES),
            on_message=self._on_message,
            on_end=self._on_end,
            max_waiting=max_on_the_way(options),
        )

    @abc.abstractmethod
    def _on_greeting(self, kind: int, frames: Sequence[Buffer]) -> None:
        """The first message of the peer, and every one until there is a link."""

    @abc.abstractmethod
    def _on_early_end(self, error: WireError | None) -> None:
        """The connection ended before there was a link, or what came over it cannot be understood."""

    @abc.abstractmethod
    def _on_released(self) -> None:
        """The socket is closed, but for what it still has to send."""

    def leave(self) -> None:
        self._stream.close(linger_s=LINGER_S)
        self._on_released()

    def _linked(self, remote: Hello) -> UnixLink:
        reader = self._stream.reader
        reader.max_frames = self._options.max_frames + HELLO_FRAMES  # the header, and a table of what is in shared memory
        reader.max_frame_bytes = max(self._local.max_frame_bytes, MAX_HELLO_BYTES)
        self.link = UnixLink(self._stream, local=self._local, remote=remote, options=self._options, forget=self.leave)
        return self.link

    def _on_message(self, parts: list[Buffer]) -> None:
        if self.link is not None:
            self.link.on_message(parts[0], parts[1:])
        else:
            self._on_greeting(header_kind(parts[0]), parts[1:])

    def _on_end(self, error: WireError | None) -> None:
        if self.link is not None:
            self.link.on_disconnected(error)
        else:
            self._on_early_end(error)


class UnixListener(Listener):
    """A listening socket, and the connections that it has accepted."""

    def __init__(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> None:
        self.address = address
        self._hello = offered(hello, options)
        self._on_link = on_link
        self._options = options
        self._connections: set[_Accepted] = set()
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._socket = listening(address)
        self._refusals = RefusalLog(address)
        self._heart = Heart(self._links, period_s=options.heartbeat_s)
        self._accept_from_now()

    async def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._heart.stop()
        self._loop.remove_reader(self._socket.fileno())
        if self._retry is not None:
            self._retry.cancel()
        self._socket.close()
        remove_socket_file(self.address)
        await asyncio.gather(*(connection.close() for connection in list(self._connections)))

    def _links(self) -> list[UnixLink]:
        return [connection.link for connection in self._connections if connection.link is not None]

    def _accept_from_now(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # of descriptors, say, there are none left
                log.warning("cannot accept a peer at %s: %s", self.address, error.strerror)
                self._loop.remove_reader(self._socket.fileno())
                self._retry = self._loop.call_later(RETRY_S, self._accept_from_now)
                return
            if len(self._connections) >= MAX_CONNECTIONS:
                self._refusals.refused(f"{MAX_CONNECTIONS} peers are connected already")
                connection.close()
            else:
                self._connections.add(
                    _Accepted(
                        connection,
                        local=self._hello,
                        options=self._options,
                        on_link=self._on_link,
                        on_refused=self._refusals.refused,
                        forget=self._connections.discard,
                    )
                )


class _Accepted(_Connection):
    def __init__(
        self,
        connection: socket.socket,
        *,
        local: Hello,
        options: LinkOptions,
        on_link: AcceptHandler,
        on_refused: Callable[[str], None],
        forget: Callable[[_Accepted], None],
    ) -> None:
        super().__init__(connection, local=local, options=options)
        self._on_link = on_link
        self._on_refused = on_refused
        self._forget = forget
        late = WireError(f"no Hello within {options.handshake_s:g} s")
        self._patience = asyncio.get_running_loop().call_later(options.handshake_s, self._on_early_end, late)

    async def close(self) -> None:
        if self.link is not None:
            await self.link.close()
        else:
            self.leave()

    def _on_end(self, error: WireError | None) -> None:
        """A process that is killed ends its connections a moment before its parent hears of it."""
        if self.link is not None and error is None:
            self._patience = asyncio.get_running_loop().call_later(NEWS_S, self.link.on_disconnected)
        else:
            super()._on_end(error)

    def _on_greeting(self, kind: int, frames: Sequence[Buffer]) -> None:
        try:
            if kind != Kind.HELLO:
                raise WireError("say Hello first")
            remote = decode_hello(bytes(only_frame(frames)))
            check_hello(remote, token=self._local.token)
            self._stream.send([plain(Kind.WELCOME), encode_hello(self._local)])
        except (Refused, WireError) as error:
            self._refuse(str(error))
        except AsyncPipeError as error:
            log.info("a peer left during its handshake: %s", error)
            self.leave()
        else:
            self._patience.cancel()
            link = self._linked(remote)
            link.share_memory()
            self._on_link(link)

    def _on_early_end(self, error: WireError | None) -> None:
        if error is not None:
            self._refuse(str(error))
        else:
            self.leave()

    def _refuse(self, reason: str) -> None:
        self._on_refused(reason)
        with contextlib.suppress(AsyncPipeError):  # it may have left already
            self._stream.send([plain(Kind.REFUSE), encode_refusal(reason)])
        self.leave()

    def _on_released(self) -> None:
        self._patience.cancel()
        self._forget(self)


class _Offered(_Connection):
    """The connector's side. `answer` is None where the peer left without one."""

    def __init__(self, connection: socket.socket, address: str, *, local: Hello, options: LinkOptions) -> None:
        super().__init__(connection, local=local, options=options)
        self.answer: asyncio.Future[UnixLink | None] = asyncio.get_running_loop().create_future()
        self._address = address
        self._heart: Heart | None = None
        with contextlib.suppress(AsyncPipeError):  # it has left already, which its end tells
            self._stream.send([plain(Kind.HELLO), encode_hello(local)])

    def _on_greeting(self, kind: int, frames: Sequence[Buffer]) -> None:
        if self.answer.done():
            return
        try:
            if kind == Kind.REFUSE:
                raise Refused(f"{self._address} refused: {decode_refusal(bytes(only_frame(frames)))}")
            if kind != Kind.WELCOME:
                raise WireError(f"{self._address} does not speak this protocol")
            link = self._linked(decode_hello(bytes(only_frame(frames))))
        except AsyncPipeError as error:
            self.answer.set_exception(error)
        else:
            self._heart = Heart(lambda: (link,), period_s=self._options.heartbeat_s)
            link.share_memory()
            self.answer.set_result(link)

    def _on_early_end(self, error: WireError | None) -> None:
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(WireError(f"{self._address} does not speak this protocol: it sent {error}"))

    def _on_released(self) -> None:
        if self._heart is not None:
            self._heart.stop()


class UnixTransport(Transport):
    """`ipc`."""

    schemes = frozenset({"ipc"})

    async def listen(self, address: str, *, hello: Hello, on_link: AcceptHandler, options: LinkOptions) -> Listener:
        return UnixListener(address, hello=hello, on_link=on_link, options=options)

    async def connect(self, address: str, *, hello: Hello, options: LinkOptions) -> UnixLink:
        local = offered(hello, options)
        try:
            async with asyncio.timeout(options.handshake_s):
                while (link := await _greet(address, local, options)) is None:  # noqa: ASYNC110 - nothing would set an event
                    await asyncio.sleep(RETRY_S)
                return link
        except TimeoutError:
            raise Timeout(f"nobody answered at {address} within {options.handshake_s:g} s") from None


async def _greet(address: str, local: Hello, options: LinkOptions) -> UnixLink | None:
    """None where nobody is, or who was there left without an answer: there may be another in its place."""
    connection = connected(address)
    if connection is None:
        return None
    offer = _Offered(connection, address, local=local, options=options)
    try:
        link = await offer.answer
    except BaseException:
        offer.leave()
        raise
    if link is None:
        offer.leave()
    return link
