"""Sending without waiting: an actor between the coordinator and each peer, so that no slow peer can hold up the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from asyncpipe.actors import Actor, ActorRef
from asyncpipe.errors import AsyncPipeError
from asyncpipe.wire.messages import Message


@dataclass(frozen=True, slots=True)
class SendFailed:
    """Signalled to the outbox's owner: `target` takes no more messages."""

    target: ActorRef
    error: AsyncPipeError


class Outbox(Actor):
    """Forwards in order to `target`. Its mailbox bounds what may wait: the owner's `tell_nowait` raises Busy beyond that."""

    mailbox_capacity: ClassVar[int] = 8192

    def __init__(self, target: ActorRef, *, owner: ActorRef, timeout_s: float) -> None:
        self._target = target
        self._owner = owner
        self._timeout_s = timeout_s
        self._failed = False

    async def handle(self, message: Message) -> None:
        if self._failed:
            return
        try:
            await self._target.tell(message, timeout=self._timeout_s)
        except AsyncPipeError as error:
            self._failed = True
            self._owner.signal(SendFailed(self._target, error))
