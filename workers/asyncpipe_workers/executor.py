"""The one compute thread of a stage: work in order, timed.

Work is queued ahead, so that the thread goes from one step to the next without a turn of the event loop between them. A plain
thread and queue: futures of `concurrent.futures` cost a third of a short step's time on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """What work gave, its result or its exception, and when it was begun and done, on the monotonic clock."""

    result: T | None
    error: Exception | None
    start_ns: int
    end_ns: int

    def unwrap(self) -> T:
        """The result, or raise."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class _Work:
    call: Callable[[], Iterable[Any]]
    on_each: Callable[[Timed[Any]], None]


class ComputeThread:
    """Runs blocking work off the event loop, one call at a time and in order. Its user bounds what is queued."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def queue(self, call: Callable[[], Iterable[T]], on_each: Callable[[Timed[T]], None]) -> None:
        """Run `call` on the thread after what was queued before, and `on_each` on the event loop for each of its results as
        it comes. An exception is the last result."""
        self._work.put(_Work(call, on_each))

    async def run(self, call: Callable[[], T]) -> T:
        """Run `call` on the thread; its exception is raised here. Cancelling the wait does not interrupt the work."""
        done: asyncio.Future[Timed[T]] = self._loop.create_future()
        self.queue(lambda: (call(),), lambda timed: None if done.done() else done.set_result(timed))
        return (await done).unwrap()

    def close(self) -> None:
        """Take no more work; do not wait for what is running (the process ends next)."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            for timed in _timed(work.call):
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                    self._loop.call_soon_threadsafe(work.on_each, timed)


def _timed(call: Callable[[], Iterable[T]]) -> Iterator[Timed[T]]:
    start_ns = time.monotonic_ns()
    try:
        for result in call():
            end_ns = time.monotonic_ns()
            yield Timed(result, None, start_ns, end_ns)
            start_ns = end_ns
    except Exception as error:
        yield Timed(None, error, start_ns, time.monotonic_ns())
