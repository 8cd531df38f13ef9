"""One actor's life: its mailbox, its task, its crashes and restarts, its end."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncpipe.actors.actor import Actor
from asyncpipe.actors.mailbox import Letter, Mailbox, closed_error
from asyncpipe.actors.ref import ActorRef, current_actor
from asyncpipe.actors.supervisor import RestartCounter, RestartPolicy
from asyncpipe.clock import Clock
from asyncpipe.errors import AsyncPipeError, Closed, RemoteError
from asyncpipe.wire.codec import Codec

if TYPE_CHECKING:
    from asyncpipe.actors.system import ActorSystem

STOPPED_HOOK_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)

Factory = Callable[[], Actor]
Sleep = Callable[[float], Awaitable[None]]


class Life(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    BACKING_OFF = "backing off"
    STOPPED = "stopped"


_LEGAL_MOVES = {
    Life.STARTING: {Life.RUNNING, Life.BACKING_OFF, Life.STOPPED},
    Life.RUNNING: {Life.BACKING_OFF, Life.STOPPED},
    Life.BACKING_OFF: {Life.STARTING, Life.STOPPED},
    Life.STOPPED: set[Life](),
}


@dataclass(frozen=True, slots=True)
class _Stop:
    """Control letter: finish after the message at hand."""


@dataclass(frozen=True, slots=True)
class _Crash:
    """Control letter: work beside the mailbox has failed."""

    error: Exception


class Cell:
    """Owned by a system; `run` is the actor's one task."""

    def __init__(
        self, factory: Factory, *, ref: ActorRef, system: ActorSystem, policy: RestartPolicy, clock: Clock, sleep: Sleep
    ) -> None:
        self._factory = factory
        self._system = system
        self._policy = policy
        self._clock = clock
        self._sleep = sleep
        self._restarts = RestartCounter(policy)
        self._beside: set[asyncio.Task[None]] = set()
        self.ref = ref
        self.actor = factory()  # at once, so that a factory's mistake is its caller's
        self.mailbox = Mailbox(ref.name, self.actor.mailbox_capacity)
        self.codec: Codec[Any] | None = Codec(self.actor.receives) if self.actor.receives != () else None
        self.life = Life.STARTING
        self.ended: asyncio.Future[AsyncPipeError] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    def request_stop(self) -> None:
        if self.life is not Life.STOPPED:
            self.mailbox.put_control(Letter(_Stop()))

    async def run(self) -> None:
        """Until it stops, or crashes once too often; then everyone who waits for it is told."""
        current_actor.set(self.ref)
        end: AsyncPipeError = closed_error(self.ref.name)
        try:
            if (crash := await self._live()) is not None:
                end = _as_ours(crash)
                if self._policy.escalate:
                    raise crash
        finally:
            self._move(Life.STOPPED)
            self.mailbox.close(Closed(f"actor {self.ref.name} has stopped: {end}"))
            self.ended.set_result(end)

    def run_beside(
        self, coroutine: Coroutine[Any, Any, None], task_of: Callable[..., asyncio.Task[None]]
    ) -> asyncio.Task[None]:
        task = task_of(self._guarded(coroutine))
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        task.add_done_callback(lambda _: coroutine.close())  # of a task that was cancelled before it began
        return task

    async def _live(self) -> Exception | None:
        """None after an orderly stop; the last crash when there was one too many."""
        while (crash := await self._run_instance()) is not None:
            backoff_s = self._restarts.backoff_after_crash_s(self._clock.now_s())
            if backoff_s is None:
                return crash
            self._move(Life.BACKING_OFF)
            log.warning("actor %s starts again in %.3g s after: %s", self.ref.name, backoff_s, crash)
            await self._sleep(backoff_s)
            self._move(Life.STARTING)
            self.actor = self._factory()
        return None

    async def _run_instance(self) -> Exception | None:
        actor = self.actor
        actor.ref, actor.system = self.ref, self._system
        try:
            await actor.started()
            self._move(Life.RUNNING)
            await self._read_mail(actor)
        except Exception as error:
            log.log(
                logging.WARNING if isinstance(error, AsyncPipeError) else logging.ERROR,
                "actor %s crashed: %s",
                self.ref.name,
                error,
                exc_info=not isinstance(error, AsyncPipeError),
            )
            return error
        finally:
            await self._stop_instance(actor)
        return None

    async def _read_mail(self, actor: Actor) -> None:
        while True:
            letter = await self.mailbox.get()
            match letter.message:
                case _Stop():
                    return
                case _Crash(error):
                    raise error
                case message:
                    actor.sender = letter.sender
                    if letter.reply is None:
                        await actor.handle(message)
                    else:
                        await _answer(actor, letter)

    async def _stop_instance(self, actor: Actor) -> None:
        for task in self._beside:
            task.cancel()
        async with asyncio.timeout(STOPPED_HOOK_TIMEOUT_S):
            await actor.stopped()

    async def _guarded(self, coroutine: Coroutine[Any, Any, None]) -> None:
        current_actor.set(self.ref)
        try:
            await coroutine
        except Exception as error:
            if self.life is not Life.STOPPED:
                self.mailbox.put_control(Letter(_Crash(error)))

    def _move(self, to: Life) -> None:
        if to not in _LEGAL_MOVES[self.life]:
            raise RuntimeError(f"actor {self.ref.name} cannot go from {self.life.value} to {to.value}")
        self.life = to


async def _answer(actor: Actor, letter: Letter) -> None:
    reply = letter.reply
    assert reply is not None  # noqa: S101 - the caller has looked
    try:
        answer = await actor.handle(letter.message)
    except AsyncPipeError as error:
        reply(error)
    except Exception as error:
        reply(_as_ours(error))
        raise
    except BaseException:
        reply(closed_error(actor.ref.name))
        raise
    else:
        if isinstance(answer, asyncio.Future):
            answer.add_done_callback(lambda done: reply(_outcome(done, actor)))
        else:
            reply(answer)


def _outcome(done: asyncio.Future[Any], actor: Actor) -> Any:
    """What an asker is told of an answer that came later."""
    if done.cancelled():
        return closed_error(actor.ref.name)
    error = done.exception()
    return done.result() if error is None else _as_ours(error)


def _as_ours(error: BaseException) -> AsyncPipeError:
    return error if isinstance(error, AsyncPipeError) else RemoteError(f"{type(error).__name__}: {error}")
