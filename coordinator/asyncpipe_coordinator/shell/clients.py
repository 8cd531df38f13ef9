"""The clients of a coordinator: one outbox for each, and one message a step for all that has happened to its requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from asyncpipe.actors import ActorRef, ActorSystem
from asyncpipe.errors import AsyncPipeError
from asyncpipe.wire.messages import Failed, Finished, Piece, PromptScored, Updates
from asyncpipe_coordinator.shell.outbox import Outbox

STALL_S = 20.0  # a client that takes nothing for so long is cut off

Update = Piece | PromptScored | Finished | Failed


@dataclass(slots=True, eq=False)
class Recipient:
    """A client: where its updates go, and those that wait for the end of the message at hand."""

    ref: ActorRef
    outbox: Outbox
    outbox_ref: ActorRef
    updates: list[Update] = field(default_factory=list)


class Clients:
    """`owner` watches them, and hears `SendFailed` of those that take no more."""

    def __init__(self, system: ActorSystem, *, owner: ActorRef) -> None:
        self._system = system
        self._owner = owner
        self._clients: dict[ActorRef, Recipient] = {}
        self._with_updates: list[Recipient] = []  # to be sent to when the message at hand is dealt with
        self._count = 0

    def __contains__(self, ref: ActorRef) -> bool:
        return ref in self._clients

    def get(self, ref: ActorRef) -> Recipient:
        """A new one with its first request."""
        if ref not in self._clients:
            self._count += 1
            outbox = Outbox(ref, owner=self._owner, timeout_s=STALL_S)
            outbox_ref = self._system.spawn(lambda: outbox, name=f"client-{self._count}")
            self._clients[ref] = Recipient(ref, outbox, outbox_ref)
            self._system.monitor(ref, watcher=self._owner)
        return self._clients[ref]

    def pop(self, ref: ActorRef) -> Recipient | None:
        """It gets nothing any more; its outbox is to be stopped."""
        return self._clients.pop(ref, None)

    def update(self, client: Recipient, update: Update) -> None:
        """To be sent with the next `send_updates`."""
        if not client.updates:
            self._with_updates.append(client)
        client.updates.append(update)

    def send_updates(self, on_failure: Callable[[ActorRef, AsyncPipeError], None]) -> None:
        for client in self._with_updates:
            updates, client.updates = client.updates, []
            if client.ref not in self._clients:
                continue
            try:
                client.outbox.post(Updates(updates=tuple(updates)), outbox=client.outbox_ref)
            except AsyncPipeError as error:
                on_failure(client.ref, error)
        self._with_updates.clear()
