"""A stage's links for hidden states beside its messages: one from the stage before, one to the stage after.

Who sends asks who receives; both must have what is wanted, and where one has not, hidden states travel in the messages. A link
lives for one epoch. Nothing of this is used, and torch is not imported, where messages are all that was asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncpipe.actors import ActorRef
from asyncpipe.errors import AsyncPipeError, Broken, Invalid
from asyncpipe.wire.links import HostLink, LinkHosted, LinkKind, Posted
from asyncpipe.wire.tensors import DType
from asyncpipe_workers.output import Posting

if TYPE_CHECKING:
    import torch

    from asyncpipe_workers.links import Hosting, TensorLink

ASK_TIMEOUT_S = 20.0
JOIN_TIMEOUT_S = 15.0
MAX_IN_FLIGHT = 1024  # there are never more than micro-batches
NUM_TAGS = 1 << 30


class StageSeat(NamedTuple):
    """Where a stage computes, and the address of the interface that its neighbours reach it by."""

    machine: str
    device: str
    card: str
    ip: str


class Chosen(NamedTuple):
    """How hidden states travel, and why not as was wanted, if so."""

    link: LinkKind
    obstacle: str = ""


class HiddenLinks:
    """`background` runs what is to be awaited later: the other end's coming, and the end of a link."""

    def __init__(self, seat: StageSeat, *, background: Callable[[Coroutine[Any, Any, None], str], None]) -> None:
        self._seat = seat
        self._background = background
        self._outgoing: TensorLink | None = None
        self._incoming: asyncio.Future[TensorLink] | None = None
        self._next_tag = 0

    @property
    def sends(self) -> bool:
        """Whether hidden states go out over a link."""
        return self._outgoing is not None

    async def connect(self, following: ActorRef, *, wanted: str, epoch: int, device: str) -> Chosen:
        """To the stage after this one; what cannot be had becomes ZMQ."""
        if wanted == LinkKind.ZMQ:
            return Chosen(LinkKind.ZMQ)
        from asyncpipe_workers.links import join, offered_here

        seat = self._seat._replace(device=device)
        offered = tuple(sorted(offered_here()))
        question = HostLink(
            epoch=epoch, wanted=wanted, machine=seat.machine, device=seat.device, card=seat.card, offered=offered
        )
        try:
            answer = await following.ask(question, timeout=ASK_TIMEOUT_S)
            if answer.offer is None:
                return Chosen(LinkKind.ZMQ, answer.obstacle)
            self._outgoing = await join(
                answer.offer,
                peer="the next stage",
                device=_torch_device(device),
                timeout_s=JOIN_TIMEOUT_S,
                max_in_flight=MAX_IN_FLIGHT,
            )
        except AsyncPipeError as error:
            return Chosen(LinkKind.ZMQ, f"there is no {wanted} link: {error}")
        return Chosen(answer.offer.kind)

    async def host(self, question: HostLink, *, device: str) -> LinkHosted:
        """For the stage before this one."""
        from asyncpipe_workers.links import Seat, choose_link, host, offered_here

        seats = (Seat(question.machine, question.device, question.card), Seat(self._seat.machine, device, self._seat.card))
        try:
            kind = choose_link(question.wanted, seats=seats, offered=offered_here() & set(question.offered))
        except Invalid as error:
            return LinkHosted(obstacle=str(error))
        if kind is LinkKind.ZMQ:
            return LinkHosted()
        hosting = await host(
            kind,
            address_ip=self._seat.ip,
            epoch=question.epoch,
            peer="the stage before",
            device=_torch_device(device),
            timeout_s=JOIN_TIMEOUT_S,
            max_in_flight=MAX_IN_FLIGHT,
        )
        self._incoming = asyncio.get_running_loop().create_future()
        self._background(_await_sender(hosting, self._incoming), "await a link")
        return LinkHosted(offer=hosting.offer)

    def send(self, posting: Posting, on_failure: Callable[[AsyncPipeError], None]) -> Posted:
        """What the message says of it."""
        assert self._outgoing is not None  # noqa: S101 - the caller has looked
        tag, self._next_tag = self._next_tag, (self._next_tag + 1) % NUM_TAGS

        def look(sent: asyncio.Future[None]) -> None:
            error = None if sent.cancelled() else sent.exception()
            if isinstance(error, AsyncPipeError):
                on_failure(error)

        tensor = posting.hidden
        self._outgoing.send(tag, tensor, after=posting.after).add_done_callback(look)
        return Posted(tag, DType(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))

    def recv(self, posted: Posted) -> asyncio.Future[torch.Tensor]:
        """Posted now, or as soon as the other end has come. Raises Broken without a link."""
        if self._incoming is None:
            raise Broken("hidden states were sent over a link that is not there")
        arrived: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        if self._incoming.done():
            _post(self._incoming, posted, arrived)
        else:
            self._incoming.add_done_callback(lambda incoming: _post(incoming, posted, arrived))
        return arrived

    def close(self) -> None:
        """Of this epoch's; what is under way fails."""
        for link in self._let_go():
            self._background(link.close(), "close a link")

    async def stop(self) -> None:
        """For good: the process is about to end, and threads of the links must not outlive it."""
        await asyncio.gather(*(link.close() for link in self._let_go()))

    def _let_go(self) -> list[TensorLink]:
        incoming, self._incoming = self._incoming, None
        outgoing, self._outgoing = self._outgoing, None
        links = [outgoing] if outgoing is not None else []
        if incoming is not None:
            if incoming.done() and not incoming.cancelled() and incoming.exception() is None:
                links.append(incoming.result())
            incoming.cancel()
        return links


async def _await_sender(hosting: Hosting, incoming: asyncio.Future[TensorLink]) -> None:
    try:
        link = await hosting.joined()
    except AsyncPipeError as error:
        if not incoming.done():
            incoming.set_exception(error)
            incoming.exception()  # whoever wants to receive hears of it
        return
    if incoming.done():  # another epoch has begun
        await link.close()
    else:
        incoming.set_result(link)


def _post(incoming: asyncio.Future[TensorLink], posted: Posted, arrived: asyncio.Future[torch.Tensor]) -> None:
    import torch

    if incoming.cancelled():
        arrived.cancel()
        return
    try:
        received = incoming.result().recv(posted.tag, shape=posted.shape, dtype=getattr(torch, posted.dtype.value))
    except AsyncPipeError as error:
        arrived.set_exception(error)
        return
    received.add_done_callback(lambda done: _copy(done, arrived))


def _copy(done: asyncio.Future[torch.Tensor], to: asyncio.Future[torch.Tensor]) -> None:
    if to.done():
        return
    if done.cancelled():
        to.cancel()
    elif (error := done.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(done.result())


def _torch_device(device: str) -> torch.device:
    import torch

    return torch.device(device)
