"""The async client of a coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Unpack

from asyncpipe.actors import ActorSystem
from asyncpipe.client.inbox import Event
from asyncpipe.client.progress import Progress
from asyncpipe.client.results import Generation
from asyncpipe.client.sampling import SamplingOptions, make_sampling
from asyncpipe.client.session import Sessions
from asyncpipe.client.stream import TextStream
from asyncpipe.errors import AsyncPipeError, Broken, Closed, Invalid
from asyncpipe.ids import new_request_id
from asyncpipe.transport.base import LinkOptions
from asyncpipe.transport.keys import Keys, load_keys
from asyncpipe.wire.messages import Accepted, Cancel, Finished, Generate, GetStatus, Status

CONTROL_TIMEOUT_S = 10.0
DEFAULT_TIMEOUT_S = 600.0
RESUME_WITHIN_S = 60.0


@contextlib.asynccontextmanager
async def connect(
    address: str, *, timeout_s: float = CONTROL_TIMEOUT_S, keys: str | Path | None = None
) -> AsyncIterator[Client]:
    """Connect to the coordinator at `address` ("tcp://host:port", "ipc://…").

    Over tcp, `keys` is a directory with a client's keys; None: as the environment says (see `load_keys`), if it does. Raises
    Timeout when nobody answers there within `timeout_s`, Refused when it does not speak this protocol or know our key,
    Invalid for a malformed address or bad keys.
    """
    async with ActorSystem("client", role="client", options=LinkOptions(keys=_keys(address, keys))) as system:
        sessions = Sessions(system, address)
        await sessions.open(timeout_s=timeout_s)
        yield Client(sessions)


class Client:
    """Generates text. Made by `connect` or `asyncpipe.local`; safe to use from many tasks at once."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        request_id: str | None = None,
        priority: int = 0,
        resume: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Generate from a text, or from token ids, and wait for all of it. See `SamplingOptions` for the rest.

        Requests of a higher `priority` leave the coordinator's waiting queue first. With `resume`, a request for one text
        goes on where it was when the coordinator dies and is there again within a minute.

        Raises Invalid (bad parameters, prompt too long), Busy (the coordinator's queue is full), StageLost (a worker died),
        Broken (the coordinator died), Timeout (not finished within `timeout_s`).
        """
        stream = self.stream(prompt, timeout_s=timeout_s, request_id=request_id, priority=priority, resume=resume, **sampling)
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
        resume: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> TextStream:
        """Like `generate`, token by token: `async for piece in client.stream(…)`. Errors are raised by the loop."""
        message = _generate(prompt, request_id=request_id, priority=priority, deadline_s=timeout_s, options=sampling)
        if resume and message.sampling.n > 1:
            raise Invalid(f"resume is for one text; n={message.sampling.n} asks for several")
        make_events = self._resumed_events if resume else self._events
        events = make_events(message, timeout_s=timeout_s)
        return TextStream(message.request_id, events, num_choices=message.sampling.n)

    async def cancel(self, request_id: str) -> None:
        """End a request of this client; it finishes with reason `cancelled`. An unknown id is ignored."""
        await self._sessions.current.coordinator.tell(Cancel(request_id=request_id), timeout=CONTROL_TIMEOUT_S)

    async def status(self) -> Status:
        """What the coordinator runs: its stages, their memory and busy share, request and token counts."""
        return await self._sessions.current.status.ask(GetStatus(), timeout=CONTROL_TIMEOUT_S)

    async def _events(self, message: Generate, *, timeout_s: float) -> AsyncGenerator[Accepted | Event, None]:
        """A request from its start to its end; whatever leaves it early cancels it."""
        session = self._sessions.current
        inbox = session.inboxes.open(message.request_id, num_choices=message.sampling.n)
        num_open = message.sampling.n
        asked_at_s = time.monotonic()
        try:
            accepted = await session.coordinator.ask(message, timeout=timeout_s)  # long prompts wait to be tokenized
            yield accepted
            async for event in inbox.events(timeout_s=timeout_s, waited_s=time.monotonic() - asked_at_s):
                num_open -= isinstance(event, Finished)
                yield event
        finally:
            session.inboxes.forget(message.request_id)
            if num_open:
                with contextlib.suppress(AsyncPipeError):  # the coordinator may be gone, which is why we are leaving
                    session.coordinator.signal(Cancel(request_id=message.request_id))

    async def _resumed_events(self, message: Generate, *, timeout_s: float) -> AsyncGenerator[Accepted | Event, None]:
        """The same from one coordinator after another, each going on where the one before it was lost."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        progress = Progress(message)
        while True:
            session, left_s = self._sessions.current, max(deadline_s - loop.time(), 0.001)
            try:
                async with contextlib.aclosing(self._events(progress.rest(deadline_s=left_s), timeout_s=left_s)) as events:
                    async for event in events:
                        if (new := progress.note(event)) is not None:
                            yield new
                return
            except (Broken, Closed) as error:
                if not self._sessions.is_lost(session):
                    raise
                await self._sessions.reopen(session, within_s=min(RESUME_WITHIN_S, deadline_s - loop.time()), error=error)


def _keys(address: str, directory: str | Path | None) -> Keys | None:
    """No other scheme uses them, so that keys which cannot be read, meant for somebody else, do no harm there."""
    return load_keys(Path(directory) if directory else None, role="client") if address.startswith("tcp://") else None


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
