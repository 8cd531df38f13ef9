"""What a user writes: a class that handles one message at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from asyncpipe.actors.ref import ActorRef
from asyncpipe.errors import AsyncPipeError, ErrorData

if TYPE_CHECKING:
    from asyncpipe.actors.system import ActorSystem


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Down:
    """Signalled to the watchers of `ref` once: it stopped (`closed`), crashed for good, or its process is gone (`broken`)."""

    ref: ActorRef
    error: ErrorData


class Actor:
    """Subclass it and override `handle`. An instance is made by the factory given to `ActorSystem.spawn`."""

    receives: ClassVar[Any] = ()
    """The union of Message types that other processes may send. Messages of this process may be any object."""

    mailbox_capacity: ClassVar[int] = 64

    ref: ActorRef
    system: ActorSystem
    sender: ActorRef | None = None
    """Who sent the message being handled, when an actor did."""

    async def started(self) -> None:
        """Called before the first message, and again on the fresh instance after a restart."""

    async def handle(self, message: Any) -> Any:
        """Handle one message; for an ask, return the answer, or a future of it (`answer_later`): the next message is handled
        meanwhile.

        An exception out of an ask goes to the asker; one of asyncpipe's own (Invalid, say) ends there. Any other exception,
        and every exception out of a tell, is a crash: the restart policy decides.
        """
        raise NotImplementedError(f"{type(self).__name__} handles no messages")

    async def stopped(self) -> None:
        """Called after the last message, on an orderly stop and after a crash."""

    def background(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run `coroutine` beside the mailbox. It is cancelled with the actor; when it fails, the actor crashes."""
        self.system.run_beside(self.ref, coroutine, name=name)

    def answer_later(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Future[T]:
        """For `handle` to return: what `coroutine`, which runs beside the mailbox, gives or raises. As there, an exception that
        is not asyncpipe's own is a crash too."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = self.system.run_beside(self.ref, _settle(answer, coroutine), name=name)
        task.add_done_callback(lambda _: coroutine.close())  # of a task that was cancelled before it began
        task.add_done_callback(lambda _: answer.cancel())
        return answer


async def _settle(answer: asyncio.Future[T], coroutine: Coroutine[Any, Any, T]) -> None:
    try:
        answer.set_result(await coroutine)
    except Exception as error:
        answer.set_exception(error)
        if not isinstance(error, AsyncPipeError):
            raise
