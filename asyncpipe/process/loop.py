"""Running a process's main coroutine: uvloop where it exists, and an orderly end on Ctrl-C and TERM."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

SIGNAL_EXIT = 128  # a shell's convention: 130 for SIGINT, 143 for SIGTERM


def run(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run `main` to its end and return its exit status. The first SIGINT or SIGTERM cancels it; a second one ends it now."""
    received: list[int] = []

    async def supervised() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def on_signal(number: int) -> None:
            if received or task is None:
                os._exit(SIGNAL_EXIT + number)
            received.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, int(number))
        return await main()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            return runner.run(supervised())
        except asyncio.CancelledError:
            if not received:
                raise
            return SIGNAL_EXIT + received[0]


def exit_on_term() -> None:
    """Call first in a program: until its loop runs, SIGTERM ends it even as the first process of a container, where the kernel
    does nothing by itself."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(SIGNAL_EXIT + number))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
