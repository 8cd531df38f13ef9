"""The one compute thread of a stage, and how long it has been busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ComputeCounters:
    steps: int
    busy_s: float
    span_s: float  # from the start of the first step to the end of the last


class ComputeThread:
    """Runs blocking work off the event loop, one call at a time and in order."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._steps = 0
        self._busy_s = 0.0
        self._first_start_s = 0.0
        self._last_end_s = 0.0

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` on the thread; its exception is raised here. Cancelling the wait does not interrupt the work."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def step(self, work: Callable[[], T]) -> T:
        """Like `run`, and counted as busy time."""
        return await self.run(lambda: self._timed(work))

    def counters(self) -> ComputeCounters:
        return ComputeCounters(self._steps, self._busy_s, self._last_end_s - self._first_start_s)

    def close(self) -> None:
        """Take no more work; do not wait for what is running (the process ends next)."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _timed(self, work: Callable[[], T]) -> T:
        start_s = time.monotonic()
        if self._steps == 0:
            self._first_start_s = start_s
        try:
            return work()
        finally:
            self._last_end_s = time.monotonic()
            self._busy_s += self._last_end_s - start_s
            self._steps += 1
