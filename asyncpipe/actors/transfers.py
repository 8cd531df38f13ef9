"""Tagged tensor transfers as futures: what isend and irecv do in MPI, without an order that could deadlock.

port = TensorPort(timeout_s=10)
system.spawn(lambda: port, name="tensors")
port.connect(peer)                      # a reference to the other side's port

sent = port.send(7, tensor)             # a future: the transport has it
tensor = await port.recv(7)             # whichever comes first, the call or the tensor
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from asyncpipe.actors.actor import Actor, Down
from asyncpipe.actors.ref import ActorRef
from asyncpipe.errors import AsyncPipeError, Busy, Closed, Invalid, Timeout, from_data
from asyncpipe.wire.fields import Message
from asyncpipe.wire.tensors import Tensor

Tag = int
MAX_UNCLAIMED = 64


class Transfer(Message, frozen=True, kw_only=True):
    """port -> port: one tensor."""

    tag: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    tensor: Tensor


class TensorPort(Actor):
    """One end of a pair. Tags match in any order; at most `max_unclaimed` tensors wait here for their `recv`.

    A sender is held back (by the credits of its link) once as many have arrived unclaimed; its futures then wait.
    """

    receives: ClassVar[Any] = Transfer
    mailbox_capacity: ClassVar[int] = 8

    def __init__(self, *, timeout_s: float, max_unclaimed: int = MAX_UNCLAIMED) -> None:
        self._timeout_s = timeout_s
        self._max_unclaimed = max_unclaimed
        self._peer: ActorRef | None = None
        self._lost: AsyncPipeError | None = None
        self._arrived: dict[Tag, Tensor] = {}
        self._wanted: dict[Tag, asyncio.Future[Tensor]] = {}
        self._room: asyncio.Event = asyncio.Event()
        self._queue: deque[tuple[Transfer, asyncio.Future[None]]] = deque()
        self._sending = False

    def connect(self, peer: ActorRef) -> None:
        """Where `send` sends to. Its loss fails everything that is pending."""
        self._peer = peer.as_seen_by(self.ref)
        self.system.monitor(peer, watcher=self.ref)

    def send(self, tag: Tag, tensor: Tensor) -> asyncio.Future[None]:
        """Done when the transport has the tensor, whose bytes must not change from now on.

        The future raises Timeout, Broken or Closed; `send` itself raises Invalid before `connect`.
        """
        if self._peer is None:
            raise Invalid("connect this port to its peer before sending")
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transfer = Transfer(tag=tag, tensor=tensor)
        if self._queue or not self._sent_at_once(self._peer, transfer, sent):
            self._enqueue(self._peer, transfer, sent)
        return sent

    def recv(self, tag: Tag) -> asyncio.Future[Tensor]:
        """The tensor sent under `tag`. The future raises Timeout, Broken or Closed."""
        if tag in self._wanted:
            raise Invalid(f"tag {tag} is awaited already")
        wanted: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        if tag in self._arrived:
            wanted.set_result(self._arrived.pop(tag))
            self._room.set()
        elif self._lost is not None:
            wanted.set_exception(self._lost)
        else:
            self._wanted[tag] = wanted
            self._expire_later(wanted, lambda: f"tensor {tag} did not come from {self._peer_name()}")
            wanted.add_done_callback(lambda _: self._wanted.pop(tag, None))
            self._room.set()
        return wanted

    async def handle(self, message: Transfer | Down) -> None:
        if isinstance(message, Down):
            self._fail(from_data(message.error))
            return
        while not self._place(message):
            self._room.clear()
            await self._room.wait()  # its deadline is the sender's: the credits run out

    async def stopped(self) -> None:
        self._fail(Closed("the tensor port has stopped"))

    def _place(self, message: Transfer) -> bool:
        wanted = self._wanted.get(message.tag)
        if wanted is not None and not wanted.done():
            wanted.set_result(message.tensor)
        elif message.tag in self._arrived or len(self._arrived) >= self._max_unclaimed:
            return False
        else:
            self._arrived[message.tag] = message.tensor
        return True

    def _sent_at_once(self, peer: ActorRef, transfer: Transfer, sent: asyncio.Future[None]) -> bool:
        try:
            peer.tell_nowait(transfer)
        except Busy:
            return False
        except AsyncPipeError as error:
            sent.set_exception(error)
        else:
            sent.set_result(None)
        return True

    def _enqueue(self, peer: ActorRef, transfer: Transfer, sent: asyncio.Future[None]) -> None:
        self._queue.append((transfer, sent))
        self._expire_later(sent, lambda: f"tensor {transfer.tag} could not be sent to {self._peer_name()}")
        if not self._sending:
            self._sending = True
            self.background(self._send_queued(peer), name="send tensors")

    async def _send_queued(self, peer: ActorRef) -> None:
        """In order; a transfer whose deadline has passed is left out."""
        while self._queue:
            transfer, sent = self._queue[0]
            try:
                if not sent.done():
                    await peer.tell(transfer, timeout=self._timeout_s)
            except AsyncPipeError as error:
                if not sent.done():
                    sent.set_exception(error)
            if not sent.done():
                sent.set_result(None)
            self._queue.popleft()
        self._sending = False

    def _expire_later(self, future: asyncio.Future[Any], what: Callable[[], str]) -> None:
        def expire() -> None:
            if not future.done():
                future.set_exception(Timeout(f"{what()} within {self._timeout_s:g} s"))

        timer = asyncio.get_running_loop().call_later(self._timeout_s, expire)
        future.add_done_callback(lambda _: timer.cancel())

    def _fail(self, error: AsyncPipeError) -> None:
        self._lost = error
        pending: list[asyncio.Future[Any]] = [*self._wanted.values(), *(sent for _, sent in self._queue)]
        for future in pending:
            if not future.done():
                future.set_exception(error)
        self._room.set()

    def _peer_name(self) -> str:
        return "its peer" if self._peer is None else f"{self._peer.name} of {self._peer.node}"
