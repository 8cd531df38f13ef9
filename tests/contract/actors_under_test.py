"""Actors that the tests of the runtime use, importable by child processes."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, ClassVar

from asyncpipe.actors import Actor, Down
from asyncpipe.errors import Busy
from asyncpipe.wire.messages import Message, Request
from asyncpipe.wire.tensors import Tensor


class Echoed(Message, frozen=True, kw_only=True):
    value: int
    pid: int = 0


class Echo(Request[Echoed], frozen=True, kw_only=True):
    value: int


class Slow(Request[Echoed], frozen=True, kw_only=True):
    """Answered after `seconds`."""

    seconds: float


class Later(Request[Echoed], frozen=True, kw_only=True):
    """Answered after `seconds`, or then failed, while other messages are."""

    seconds: float
    fails: bool = False


class Fail(Request[Echoed], frozen=True, kw_only=True):
    """Answered with an error: `busy`, or a crash."""

    how: str


class Note(Message, frozen=True, kw_only=True):
    """Told: kept in order."""

    value: int
    tensor: Tensor | None = None


class Noted(Message, frozen=True, kw_only=True):
    values: tuple[int, ...]


class GetNotes(Request[Noted], frozen=True, kw_only=True):
    """What was told so far."""


class Recorder(Actor):
    """Keeps what it is told; answers; fails on request. While `gate` is closed it handles nothing."""

    receives: ClassVar[Any] = Echo | Slow | Later | Fail | Note | GetNotes
    mailbox_capacity: ClassVar[int] = 4

    def __init__(self) -> None:
        self.notes: list[int] = []
        self.downs: list[Down] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.was_stopped = False

    async def handle(self, message: Any) -> Message | asyncio.Future[Message] | None:
        if isinstance(message, Down):
            self.downs.append(message)
            return None
        if not isinstance(message, GetNotes):
            await self.gate.wait()
        match message:
            case Echo():
                return Echoed(value=message.value, pid=os.getpid())
            case Slow():
                await asyncio.sleep(message.seconds)
                return Echoed(value=0)
            case Later():
                return self.answer_later(self._later(message), name="later")
            case Fail(how="busy"):
                raise Busy("not now", retry_after_s=1.5)
            case Fail():
                raise ZeroDivisionError("oh no")
            case Note():
                self.notes.append(message.value)
            case GetNotes():
                return Noted(values=tuple(self.notes))
        return None

    async def _later(self, message: Later) -> Message:
        await asyncio.sleep(message.seconds)
        if message.fails:
            raise Busy("still not")
        return Echoed(value=1)

    async def stopped(self) -> None:
        self.was_stopped = True


class Stubborn(Recorder):
    """In a process that ignores TERM."""

    async def started(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
