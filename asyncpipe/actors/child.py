"""`python -m asyncpipe.actors.child package.module:Class NAME`: the other end of `ActorSystem.spawn_process`."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Callable

from asyncpipe.actors.actor import Actor, Down
from asyncpipe.actors.nursery import ADDRESS_VARIABLE, NURSERY_ACTOR, TOKEN_VARIABLE, ChildUp
from asyncpipe.actors.ref import ActorRef
from asyncpipe.actors.system import ActorSystem
from asyncpipe.errors import Invalid
from asyncpipe.process import die_with_parent, run

CONNECT_TIMEOUT_S = 10.0


class ParentWatch(Actor):
    """Completes `gone` when the parent's system is lost."""

    def __init__(self, parent: ActorRef, gone: asyncio.Future[None]) -> None:
        self._parent = parent
        self._gone = gone

    async def started(self) -> None:
        self.system.monitor(self._parent, watcher=self.ref)

    async def handle(self, message: Down) -> None:
        if not self._gone.done():
            self._gone.set_result(None)


async def serve(target: str, name: str) -> int:
    """Run the actor until the parent is gone or says TERM."""
    factory = load(target)
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with ActorSystem(name, role="child", token=os.environ.get(TOKEN_VARIABLE, "")) as system:
        parent = await system.connect(os.environ[ADDRESS_VARIABLE], actor=NURSERY_ACTOR, timeout=CONNECT_TIMEOUT_S)
        actor = system.spawn(factory, name=name)
        system.spawn(lambda: ParentWatch(parent, gone), name="parent watch")
        await parent.as_seen_by(actor).ask(ChildUp(name=name), timeout=CONNECT_TIMEOUT_S)
        await gone  # no deadline: serving has none
    return 0


def load(target: str) -> Callable[[], Actor]:
    """The class named by "package.module:Class". Raises Invalid."""
    module_name, _, class_name = target.partition(":")
    found = getattr(importlib.import_module(module_name), class_name, None)
    if not (isinstance(found, type) and issubclass(found, Actor)):
        raise Invalid(f"{target} is not an Actor class; write package.module:Class")
    return found


def main() -> int:
    die_with_parent()
    target, name = sys.argv[1:]
    return run(lambda: serve(target, name))


if __name__ == "__main__":
    sys.exit(main())
