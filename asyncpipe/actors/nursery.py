"""Actors in child processes: how `ActorSystem.spawn_process` starts them and hears from them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from asyncpipe.actors.actor import Actor
from asyncpipe.actors.ref import ActorRef
from asyncpipe.errors import AsyncPipeError, Broken, Invalid, Timeout
from asyncpipe.process import ChildProcess
from asyncpipe.wire.fields import Id, Message, Request

NURSERY_ACTOR = "nursery"
ADDRESS_VARIABLE = "ASYNCPIPE_PARENT_ADDRESS"
TOKEN_VARIABLE = "ASYNCPIPE_TOKEN"  # noqa: S105 - the name of a variable
TERM_AFTER_S = 0.5


class ChildAdmitted(Message, frozen=True, kw_only=True):
    """parent -> child, the answer to `ChildUp`."""


class ChildUp(Request[ChildAdmitted], frozen=True, kw_only=True):
    """child -> parent, from the child's actor: it runs."""

    name: Id


class ChildActors(Actor):
    """The parent's side: one row for each child process."""

    receives: ClassVar[Any] = ChildUp

    def __init__(self, *, token: str) -> None:
        self.token = token
        self.address = ""
        self._processes: dict[str, ChildProcess] = {}
        self._up: dict[str, asyncio.Future[ActorRef]] = {}

    async def handle(self, message: ChildUp) -> ChildAdmitted:
        up = self._up.get(message.name)
        if up is None or up.done() or self.sender is None:
            raise Invalid(f"no child named {message.name!r} is expected")
        up.set_result(self.sender)
        return ChildAdmitted()

    async def start(self, argv: Sequence[str], *, name: str, timeout_s: float) -> ActorRef:
        if name in self._processes:
            raise Invalid(f"a child process named {name!r} is running already")
        env = os.environ | {
            ADDRESS_VARIABLE: self.address,
            TOKEN_VARIABLE: self.token,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the child imports what we can import
        }
        up: asyncio.Future[ActorRef] = asyncio.get_running_loop().create_future()
        self._up[name] = up
        process = self._processes[name] = await ChildProcess.spawn(argv, env=env, name=name)
        self.background(self._watch(process), name=f"watch {name}")
        try:
            async with asyncio.timeout(timeout_s):
                return await up
        except TimeoutError:
            await process.stop()
            raise Timeout(f"child process {name} was not up within {timeout_s:g} s") from None

    async def stop(self) -> None:
        """Every child, at once; returns when all are reaped."""
        await asyncio.gather(*(process.stop(term_after_s=TERM_AFTER_S) for process in self._processes.values()))

    async def _watch(self, process: ChildProcess) -> None:
        await process.wait()
        del self._processes[process.name]
        up = self._up.pop(process.name)
        error = _exit_error(process)
        if up.done():
            self.system.lose(up.result().node, error)
        else:
            up.set_exception(error)


def _exit_error(process: ChildProcess) -> AsyncPipeError:
    lines = process.stderr_tail()
    tail = "; its last lines:\n  " + "\n  ".join(lines) if lines else ""
    return Broken(f"child process {process.name} (pid {process.pid}) {process.describe_exit()}{tail}")
