"""The client's end of its requests: an actor that sorts what the coordinator sends by request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, ClassVar

from asyncpipe.actors import Actor, ActorRef, Down
from asyncpipe.errors import AsyncPipeError, Busy, Closed, Invalid, Timeout, from_data
from asyncpipe.wire.messages import MAX_CONTEXT_TOKENS, Failed, Finished, Piece, PromptScored, Updates

MAX_OPEN_REQUESTS = 4096
MAX_EVENTS = 2 * MAX_CONTEXT_TOKENS  # more than any request has: a piece a token, its prompt's scores, its end

Event = Piece | PromptScored | Finished


class Inbox:
    """What has arrived for one request and was not read yet; bounded by the tokens that the request may generate."""

    def __init__(self, request_id: str, *, num_choices: int) -> None:
        self.request_id = request_id
        self._num_open = num_choices
        self._events: deque[Event | AsyncPipeError] = deque()
        self._news: asyncio.Future[None] | None = None  # what the reader waits for

    def put(self, event: Event | AsyncPipeError) -> None:
        if len(self._events) >= MAX_EVENTS:
            event = Busy(f"request {self.request_id} has {MAX_EVENTS} events that nobody has read")
            self._events.clear()
        self._events.append(event)
        self._wake()

    async def events(self, *, timeout_s: float, waited_s: float = 0.0) -> AsyncGenerator[Event, None]:
        """Pieces, and a Finished for every choice. Raises what ended the request, or Timeout after `timeout_s` in total, of
        which `waited_s` are over."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s - waited_s
        alarm = loop.call_at(deadline_s, self._wake)  # one for all waits: a token comes often, a deadline hardly ever
        try:
            while self._num_open:
                if not self._events:
                    if loop.time() >= deadline_s:
                        raise Timeout(f"request {self.request_id} did not finish within {timeout_s:g} s")
                    await self._wait()
                    continue
                event = self._events.popleft()
                if isinstance(event, AsyncPipeError):
                    raise event
                self._num_open -= isinstance(event, Finished)
                yield event
        finally:
            alarm.cancel()

    async def _wait(self) -> None:
        self._news = asyncio.get_running_loop().create_future()
        try:
            await self._news
        finally:
            self._news = None

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


@dataclass(frozen=True, slots=True)
class _Lost:
    """Local: nothing more will come from the coordinator."""

    error: AsyncPipeError


class InboxActor(Actor):
    """Receives for all requests of one client. A lost coordinator ends every open request with its error."""

    receives: ClassVar[Any] = Updates
    mailbox_capacity: ClassVar[int] = 256

    def __init__(self, coordinator: ActorRef) -> None:
        self._coordinator = coordinator
        self._open: dict[str, Inbox] = {}
        self.lost: AsyncPipeError | None = None  # how the coordinator was

    async def started(self) -> None:
        self.system.monitor(self._coordinator, watcher=self.ref)

    async def stopped(self) -> None:
        self._end_all(Closed("the client was closed"))

    def open(self, request_id: str, *, num_choices: int) -> Inbox:
        """Raises what the coordinator was lost by, Invalid for an id in use, Busy with too many open requests."""
        if self.lost is not None:
            raise self.lost
        if len(self._open) >= MAX_OPEN_REQUESTS:
            raise Busy(f"this client has {MAX_OPEN_REQUESTS} open requests; wait for some to end")
        if request_id in self._open:
            raise Invalid(f"request id {request_id!r} is in use; ids must be unique")
        inbox = self._open[request_id] = Inbox(request_id, num_choices=num_choices)
        return inbox

    def forget(self, request_id: str) -> None:
        self._open.pop(request_id, None)

    async def handle(self, message: Updates | Down | _Lost) -> None:
        match message:
            case Down():
                self.lost = from_data(message.error)
                self._end_after_mail(self.lost)
            case _Lost():
                self._end_all(message.error)
            case Updates():
                for update in message.updates:
                    if (inbox := self._open.get(update.request_id)) is not None:
                        inbox.put(from_data(update.error) if isinstance(update, Failed) else update)

    def _end_after_mail(self, error: AsyncPipeError) -> None:
        """This news came in the control lane: what the coordinator sent before may still wait in the other one."""
        try:
            self.ref.tell_nowait(_Lost(error))
        except Busy:
            self._end_all(error)

    def _end_all(self, error: AsyncPipeError) -> None:
        for inbox in self._open.values():
            inbox.put(error)
