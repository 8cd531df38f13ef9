"""Sending without waiting: an actor between the coordinator and each peer, so that no slow peer can hold up the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from asyncpipe.actors import Actor, ActorRef
from asyncpipe.errors import AsyncPipeError, Busy
from asyncpipe.wire.messages import Message


@dataclass(frozen=True, slots=True)
class SendFailed:
    """Signalled to the outbox's owner: `target` takes no more messages."""

    target: ActorRef
    error: AsyncPipeError


class Outbox(Actor):
    """Forwards in order to `target`: at once when it takes messages, else from a mailbox that bounds what may wait."""

    mailbox_capacity: ClassVar[int] = 8192

    def __init__(self, target: ActorRef, *, owner: ActorRef, timeout_s: float) -> None:
        self._target = target
        self._owner = owner
        self._timeout_s = timeout_s
        self._num_waiting = 0
        self._failed = False

    def post(self, message: Message, *, outbox: ActorRef) -> None:
        """For the owner, on the same loop. `outbox` is this actor. Raises Busy when too much waits, Closed, Broken."""
        if not self._num_waiting:
            try:
                self._target.tell_nowait(message)
            except Busy:
                pass
            else:
                return
        outbox.tell_nowait(message)
        self._num_waiting += 1

    async def handle(self, message: Message) -> None:
        try:
            if not self._failed:
                await self._target.tell(message, timeout=self._timeout_s)
        except AsyncPipeError as error:
            self._failed = True
            self._owner.signal(SendFailed(self._target, error))
        finally:
            self._num_waiting -= 1
