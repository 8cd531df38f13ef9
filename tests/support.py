"""What tests share: running a coroutine with a deadline and a leak check, and ending a process."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T], *, timeout_s: float = 20.0) -> T:
    """Run on uvloop within `timeout_s`; fail when the coroutine leaves tasks behind."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            result = await coroutine
        left_over = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left_over, f"tasks left over: {left_over}"
        return result

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


async def until(condition: Callable[[], object], *, timeout_s: float = 15.0) -> None:
    """It holds. Raises TimeoutError when it does not within `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def end(process: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    """Ask it to end, and kill it where that does not help."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
