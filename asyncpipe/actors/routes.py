"""How messages travel: within this system, or over a link to another one."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncpipe.actors.cell import Cell
from asyncpipe.actors.envelope import (
    Envelope,
    EnvelopeKind,
    decode_envelope,
    decode_error,
    encode_envelope,
    reply_codec,
)
from asyncpipe.actors.mailbox import Letter, Reply
from asyncpipe.actors.ref import ActorRef
from asyncpipe.errors import AsyncPipeError, Busy, Closed, Refused, Timeout, WireError, from_data, to_data
from asyncpipe.ids import ActorName, NodeId
from asyncpipe.transport.base import Delivery, Lane, Link
from asyncpipe.wire.codec import Codec, encode
from asyncpipe.wire.tensors import Buffer

if TYPE_CHECKING:
    from asyncpipe.actors.system import ActorSystem

log = logging.getLogger(__name__)


class LocalRoute:
    """To the actors of this system."""

    def __init__(self, system: ActorSystem) -> None:
        self._system = system

    @property
    def node(self) -> NodeId:
        return self._system.node

    @property
    def role(self) -> str:
        return self._system.role

    async def tell(self, name: ActorName, message: Any, sender: ActorRef | None, timeout_s: float) -> None:
        await self._system.cell(name).mailbox.put(Letter(message, sender), timeout_s=timeout_s)

    def tell_nowait(self, name: ActorName, message: Any, sender: ActorRef | None) -> None:
        self._system.cell(name).mailbox.put_nowait(Letter(message, sender))

    def signal(self, name: ActorName, message: Any, sender: ActorRef | None) -> None:
        self._system.cell(name).mailbox.put_control(Letter(message, sender))

    async def ask(self, name: ActorName, message: Any, sender: ActorRef | None, timeout_s: float) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def reply(value: Any) -> None:
            if answer.done():
                return
            if isinstance(value, Exception):
                answer.set_exception(value)
            else:
                answer.set_result(value)

        try:
            async with asyncio.timeout(timeout_s):
                await self._system.cell(name).mailbox.put(Letter(message, sender, reply), timeout_s=timeout_s)
                return await answer
        except TimeoutError:
            raise _ask_timeout(message, name, timeout_s) from None


@dataclass(slots=True)
class _PendingAsk:
    answer: asyncio.Future[Any]
    codec: Codec[Any]


class Peer:
    """The system at the other end of a link: the route to its actors, and where its messages to ours come in."""

    def __init__(self, system: ActorSystem, link: Link, on_lost: Callable[[Peer, AsyncPipeError], None]) -> None:
        self._system = system
        self._on_lost = on_lost
        self._asks: dict[int, _PendingAsk] = {}
        self._correlations = itertools.count(1)
        self.link = link

    @property
    def node(self) -> NodeId:
        return self.link.remote.node

    @property
    def role(self) -> str:
        return self.link.remote.role

    def ref(self, name: str) -> ActorRef:
        return ActorRef(ActorName(name), self)

    # --- Route ---

    async def tell(self, name: ActorName, message: Any, sender: ActorRef | None, timeout_s: float) -> None:
        await self.link.send(_pack(EnvelopeKind.TELL, name, sender, 0, encode(message)), timeout_s=timeout_s)

    def tell_nowait(self, name: ActorName, message: Any, sender: ActorRef | None) -> None:
        self.link.try_send(_pack(EnvelopeKind.TELL, name, sender, 0, encode(message)))

    def signal(self, name: ActorName, message: Any, sender: ActorRef | None) -> None:
        self.link.send_control(_pack(EnvelopeKind.TELL, name, sender, 0, encode(message)))

    async def ask(self, name: ActorName, message: Any, sender: ActorRef | None, timeout_s: float) -> Any:
        loop = asyncio.get_running_loop()
        correlation = next(self._correlations)
        pending = _PendingAsk(loop.create_future(), reply_codec(type(message)))
        deadline_s = loop.time() + timeout_s
        timer = loop.call_at(deadline_s, _expire, pending.answer, message, name, timeout_s)
        self._asks[correlation] = pending
        frames = _pack(EnvelopeKind.ASK, name, sender, correlation, encode(message))
        try:
            try:
                self.link.try_send(frames)
            except Busy:
                await self.link.send(frames, timeout_s=timeout_s)
            return await pending.answer
        finally:
            timer.cancel()
            del self._asks[correlation]
            if pending.answer.done() and not pending.answer.cancelled():
                pending.answer.exception()  # seen, even when `send` was what failed

    # --- monitors ---

    def watch(self, target: ActorRef, watcher: ActorRef) -> None:
        self.link.send_control(_pack(EnvelopeKind.MONITOR, target.name, watcher, 0, [b""]))

    def send_down(self, target: ActorRef, watcher: ActorRef, error: AsyncPipeError) -> None:
        self.link.send_control(_pack(EnvelopeKind.DOWN, watcher.name, target, 0, encode(to_data(error))))

    # --- Receiver ---

    def on_delivery(self, link: Link, delivery: Delivery) -> None:
        try:
            self._open_envelope(delivery)
        except WireError as error:
            log.warning("%s %s broke the protocol: %s", link.remote.role, link.remote.node, error)
            link.abort(error)
        except Closed as error:  # we are stopping, and whoever sent this has not heard of it yet
            delivery.done()
            log.debug("dropped a message from %s %s: %s", link.remote.role, link.remote.node, error)
        except AsyncPipeError as error:
            delivery.done()
            log.warning("dropped a message from %s %s: %s", link.remote.role, link.remote.node, error)

    def on_lost(self, link: Link, error: AsyncPipeError) -> None:
        for pending in self._asks.values():
            if not pending.answer.done():
                pending.answer.set_exception(type(error)(str(error)))
        self._on_lost(self, error)

    def _open_envelope(self, delivery: Delivery) -> None:
        envelope = decode_envelope(delivery.frames[:1])
        body = delivery.frames[1:]
        match envelope.kind:
            case EnvelopeKind.REPLY | EnvelopeKind.ERROR:
                self._on_answer(envelope, body)
                delivery.done()
            case EnvelopeKind.MONITOR:
                self._system.watch_for(self.ref(envelope.sender), ActorName(envelope.target))
                delivery.done()
            case EnvelopeKind.DOWN:
                self._system.on_remote_down(self.ref(envelope.sender), envelope.target, from_data(decode_error(body)))
                delivery.done()
            case EnvelopeKind.TELL:
                self._post(envelope, body, delivery, None)
            case EnvelopeKind.ASK:
                reply = self._replier(envelope)
                try:
                    self._post(envelope, body, delivery, reply)
                except AsyncPipeError as error:
                    delivery.done()
                    reply(error)

    def _post(self, envelope: Envelope, body: Sequence[Buffer], delivery: Delivery, reply: Reply | None) -> None:
        cell = self._system.cell(ActorName(envelope.target))
        message = _decode_for(cell, body)
        sender = self.ref(envelope.sender) if envelope.sender else None
        if delivery.lane is Lane.CONTROL:
            cell.mailbox.put_control(Letter(message, sender, reply))
        else:
            cell.mailbox.put_credited(Letter(message, sender, reply, delivery.done))

    def _on_answer(self, envelope: Envelope, body: Sequence[Buffer]) -> None:
        pending = self._asks.get(envelope.correlation)
        if pending is None or pending.answer.done():
            return  # it came too late, and its asker has been told so
        try:
            if envelope.kind is EnvelopeKind.ERROR:
                pending.answer.set_exception(from_data(decode_error(body)))
            else:
                pending.answer.set_result(pending.codec.decode(body))
        except AsyncPipeError as error:
            pending.answer.set_exception(error)

    def _replier(self, envelope: Envelope) -> Reply:
        def reply(value: Any) -> None:
            try:
                self.link.send_control(_pack_answer(envelope, value))
            except AsyncPipeError as error:
                log.warning("an answer to %s was lost: %s", self.node, error)

        return reply


def _decode_for(cell: Cell, body: Sequence[Buffer]) -> Any:
    if cell.codec is None:
        raise Refused(f"actor {cell.ref.name} takes no messages from other processes")
    return cell.codec.decode(body)


def _pack(
    kind: EnvelopeKind, target: ActorName, sender: ActorRef | None, correlation: int, body: Sequence[Buffer]
) -> list[Buffer]:
    return [encode_envelope(Envelope(kind, target, sender.name if sender else "", correlation)), *body]


def _pack_answer(envelope: Envelope, value: Any) -> list[Buffer]:
    if value is None:
        value = Refused(f"actor {envelope.target} does not answer such a message")
    kind = EnvelopeKind.ERROR if isinstance(value, BaseException) else EnvelopeKind.REPLY
    body = encode(to_data(value) if isinstance(value, BaseException) else value)
    return [encode_envelope(Envelope(kind, envelope.sender, envelope.target, envelope.correlation)), *body]


def _expire(answer: asyncio.Future[Any], message: Any, name: ActorName, timeout_s: float) -> None:
    if not answer.done():
        answer.set_exception(_ask_timeout(message, name, timeout_s))


def _ask_timeout(message: Any, name: ActorName, timeout_s: float) -> Timeout:
    return Timeout(f"actor {name} did not answer {type(message).__name__} within {timeout_s:g} s")
