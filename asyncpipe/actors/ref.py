"""A reference to an actor, the same for one in this process and one across the network."""

from __future__ import annotations

import contextvars
from typing import Any, Protocol, TypeVar

from asyncpipe.ids import ActorName, NodeId
from asyncpipe.wire.fields import Message, Request

R = TypeVar("R", bound=Message)

TELL_TIMEOUT_S = 30.0

current_actor: contextvars.ContextVar[ActorRef | None] = contextvars.ContextVar("current_actor", default=None)
"""The actor whose task is running: the sender of what it sends."""


class Route(Protocol):
    """How messages reach the actors of one system."""

    @property
    def node(self) -> NodeId: ...

    @property
    def role(self) -> str: ...

    async def tell(self, name: ActorName, message: Any, sender: ActorRef | None, timeout_s: float) -> None: ...

    def tell_nowait(self, name: ActorName, message: Any, sender: ActorRef | None) -> None: ...

    def signal(self, name: ActorName, message: Any, sender: ActorRef | None) -> None: ...

    async def ask(self, name: ActorName, message: Any, sender: ActorRef | None, timeout_s: float) -> Any: ...


class ActorRef:
    """Compared by (node, name). Holding one keeps nothing alive; an actor that has stopped answers with Closed."""

    __slots__ = ("_sender", "name", "route")

    def __init__(self, name: ActorName, route: Route, *, sender: ActorRef | None = None) -> None:
        self.name = name
        self.route = route
        self._sender = sender

    @property
    def node(self) -> NodeId:
        return self.route.node

    @property
    def role(self) -> str:
        """That its system has said it has, and where links have keys, has proven."""
        return self.route.role

    def as_seen_by(self, sender: ActorRef) -> ActorRef:
        """The same actor; what is sent through this reference comes from `sender`, whoever runs the code."""
        return ActorRef(self.name, self.route, sender=sender)

    async def tell(self, message: Any, *, timeout: float = TELL_TIMEOUT_S) -> None:
        """Send; wait while its mailbox (or our credit with its process) is used up.

        Raises Timeout after `timeout` seconds, Closed (it has stopped), Broken (its process is gone), Invalid (cannot travel).
        """
        await self.route.tell(self.name, message, self._from(), timeout)

    def tell_nowait(self, message: Any) -> None:
        """Send, or raise Busy where `tell` would wait."""
        self.route.tell_nowait(self.name, message, self._from())

    def signal(self, message: Any) -> None:
        """Send in the control lane: read before data, never waits. Raises Busy when even that is full, Closed, Broken."""
        self.route.signal(self.name, message, self._from())

    async def ask(self, message: Request[R], *, timeout: float) -> R:
        """Send and await the answer.

        Raises Timeout after `timeout` seconds, Broken when the peer dies meanwhile, and whatever the handler raised.
        """
        answer: R = await self.route.ask(self.name, message, self._from(), timeout)
        return answer

    def _from(self) -> ActorRef | None:
        return self._sender or current_actor.get()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorRef) and (self.name, self.node) == (other.name, other.node)

    def __hash__(self) -> int:
        return hash((self.name, self.node))

    def __repr__(self) -> str:
        return f"<actor {self.name} of {self.node}>"
