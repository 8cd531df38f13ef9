"""The one compute thread of a stage: work in order, timed.

Work is queued ahead, so that the thread goes from one step to the next without a turn of the event loop between them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """A result, and when its work was begun and done, on the monotonic clock."""

    result: T
    start_ns: int
    end_ns: int


class ComputeThread:
    """Runs blocking work off the event loop, one call at a time and in order."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` on the thread; its exception is raised here. Cancelling the wait does not interrupt the work."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def queue(self, work: Callable[[], T]) -> asyncio.Future[Timed[T]]:
        """Like `run`, but returns at once."""
        return asyncio.get_running_loop().run_in_executor(self._executor, lambda: _timed(work))

    def close(self) -> None:
        """Take no more work; do not wait for what is running (the process ends next)."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _timed(work: Callable[[], T]) -> Timed[T]:
    start_ns = time.monotonic_ns()
    return Timed(work(), start_ns, time.monotonic_ns())
