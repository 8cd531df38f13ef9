"""The async client of a coordinator."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Unpack

from asyncpipe.actors import ActorRef, ActorSystem
from asyncpipe.client.inbox import Event, InboxActor
from asyncpipe.client.results import Generation
from asyncpipe.client.sampling import SamplingOptions, make_sampling
from asyncpipe.client.stream import TextStream
from asyncpipe.errors import AsyncPipeError
from asyncpipe.ids import new_request_id
from asyncpipe.wire.messages import Accepted, Cancel, Finished, Generate, GetStatus, Status

CONTROL_TIMEOUT_S = 10.0
DEFAULT_TIMEOUT_S = 600.0


@contextlib.asynccontextmanager
async def connect(address: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> AsyncIterator[Client]:
    """Connect to the coordinator at `address` ("tcp://host:port", "ipc://…").

    Raises Timeout when nobody answers there within `timeout_s`, Refused when it does not speak this protocol, Invalid for a
    malformed address.
    """
    async with ActorSystem("client", role="client") as system:
        coordinator = await system.connect(address, actor="coordinator", timeout=timeout_s)
        status = await system.connect(address, actor="status", timeout=timeout_s)
        yield Client(system, coordinator=coordinator, status=status)


class Client:
    """Generates text. Made by `connect` or `asyncpipe.local`; safe to use from many tasks at once."""

    def __init__(self, system: ActorSystem, *, coordinator: ActorRef, status: ActorRef) -> None:
        self._status = status
        self._inboxes = InboxActor(coordinator)
        self._coordinator = coordinator.as_seen_by(system.spawn(lambda: self._inboxes, name="inbox"))

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        request_id: str | None = None,
        priority: int = 0,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Generate from a text, or from token ids, and wait for all of it. See `SamplingOptions` for the rest.

        Requests of a higher `priority` leave the coordinator's waiting queue first.

        Raises Invalid (bad parameters, prompt too long), Busy (the coordinator's queue is full), StageLost (a worker died),
        Broken (the coordinator died), Timeout (not finished within `timeout_s`).
        """
        stream = self.stream(prompt, timeout_s=timeout_s, request_id=request_id, priority=priority, **sampling)
        async for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        request_id: str | None = None,
        priority: int = 0,
        **sampling: Unpack[SamplingOptions],
    ) -> TextStream:
        """Like `generate`, token by token: `async for piece in client.stream(…)`. Errors are raised by the loop."""
        message = _generate(prompt, request_id=request_id, priority=priority, deadline_s=timeout_s, options=sampling)
        events = self._events(message, timeout_s=timeout_s)
        return TextStream(message.request_id, events, num_choices=message.sampling.n)

    async def cancel(self, request_id: str) -> None:
        """End a request of this client; it finishes with reason `cancelled`. An unknown id is ignored."""
        await self._coordinator.tell(Cancel(request_id=request_id), timeout=CONTROL_TIMEOUT_S)

    async def status(self) -> Status:
        """What the coordinator runs: its stages, their memory and busy share, request and token counts."""
        return await self._status.ask(GetStatus(), timeout=CONTROL_TIMEOUT_S)

    async def _events(self, message: Generate, *, timeout_s: float) -> AsyncGenerator[Accepted | Event, None]:
        """A request from its start to its end; whatever leaves it early cancels it."""
        inbox = self._inboxes.open(message.request_id, num_choices=message.sampling.n)
        num_open = message.sampling.n
        try:
            accepted = await self._coordinator.ask(message, timeout=min(timeout_s, CONTROL_TIMEOUT_S))
            yield accepted
            async for event in inbox.events(timeout_s=timeout_s):
                num_open -= isinstance(event, Finished)
                yield event
        finally:
            self._inboxes.forget(message.request_id)
            if num_open:
                with contextlib.suppress(AsyncPipeError):  # the coordinator may be gone, which is why we are leaving
                    self._coordinator.signal(Cancel(request_id=message.request_id))


def _generate(
    prompt: str | Sequence[int], *, request_id: str | None, priority: int, deadline_s: float, options: SamplingOptions
) -> Generate:
    text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, tuple(prompt))
    return Generate(
        request_id=request_id or new_request_id(),
        prompt=text,
        prompt_token_ids=token_ids,
        sampling=make_sampling(options),
        priority=priority,
        deadline_s=deadline_s,
    )
