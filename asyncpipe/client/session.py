"""A client's connection to one coordinator, and the next one to the coordinator that comes after it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from asyncpipe.actors import ActorRef, ActorSystem
from asyncpipe.client.inbox import InboxActor
from asyncpipe.errors import AsyncPipeError, Broken, Refused, Timeout

TRY_AGAIN_S = 0.2
ATTEMPT_S = 5.0


@dataclass(frozen=True, slots=True)
class Session:
    """`coordinator` is told and asked in the name of the inboxes, which get what it sends."""

    inboxes: InboxActor
    coordinator: ActorRef
    status: ActorRef


class Sessions:
    """Of one client, one after the other."""

    def __init__(self, system: ActorSystem, address: str) -> None:
        self._system = system
        self._address = address
        self._count = 0
        self._current: Session | None = None
        self._reopening = asyncio.Lock()

    @property
    def current(self) -> Session:
        """Lost or not."""
        assert self._current is not None  # noqa: S101 - `connect` opens the first one
        return self._current

    def is_lost(self, session: Session) -> bool:
        """Its link may have ended before the inboxes have heard of it."""
        return session.inboxes.lost is not None or not self._system.reaches(session.coordinator)

    async def open(self, *, timeout_s: float) -> Session:
        """Raises Timeout when nobody answers at the address, Refused."""
        coordinator = await self._system.connect(self._address, actor="coordinator", timeout=timeout_s)
        status = await self._system.connect(self._address, actor="status", timeout=timeout_s)
        inboxes = InboxActor(coordinator)
        self._count += 1
        inbox = self._system.spawn(lambda: inboxes, name=f"inbox-{self._count}")
        self._current = Session(inboxes, coordinator.as_seen_by(inbox), status)
        return self._current

    async def reopen(self, lost: Session, *, within_s: float, error: AsyncPipeError) -> Session:
        """The session after `lost`, which others may have opened already. Raises Broken, with why it was lost, when the
        coordinator is not there again within `within_s`."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        async with self._reopening:
            while self.current is lost:
                try:
                    await self.open(timeout_s=max(min(until_s - loop.time(), ATTEMPT_S), 0.01))
                except (Timeout, Broken, Refused):
                    if loop.time() >= until_s:
                        raise Broken(f"{error}; no coordinator was at {self._address} again for {within_s:g} s") from None
                    await asyncio.sleep(TRY_AGAIN_S)
        return self.current
