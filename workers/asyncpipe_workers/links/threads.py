"""Blocking calls of libraries, each on a thread of its own while it lasts; what they give comes back to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


def _nothing() -> None: ...


class Outcome(NamedTuple):
    """What a call gave: a result, or an error."""

    result: Any
    error: Exception | None


class _Call(NamedTuple):
    function: Callable[[], Any]
    on_done: Callable[[Outcome], None]


class Threads:
    """As many threads as calls were ever under way at once; whoever submits bounds that.

    Not an executor: its futures cost several times what a transfer's other steps do, and at exit it waits for all its threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_busy = 0

    def submit(self, function: Callable[[], T], on_done: Callable[[Outcome], None]) -> None:
        """Run `function` on a thread now, and `on_done` on the event loop with what it gave."""
        self._num_busy += 1
        if self._num_busy > len(self._threads):
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._calls.put(_Call(function, on_done))

    async def run(self, function: Callable[[], T]) -> T:
        """The same, awaited. A cancelled wait does not interrupt the call."""
        done: asyncio.Future[Outcome] = self._loop.create_future()
        self.submit(function, lambda outcome: None if done.done() else done.set_result(outcome))
        outcome = await done
        if outcome.error is not None:
            raise outcome.error
        result: T = outcome.result
        return result

    def release(self, *, stop: Callable[[], None] = _nothing, drop: Callable[[], None] = _nothing) -> asyncio.Future[None]:
        """End all threads. `stop` makes the calls that are under way return; `drop` is called when all have.

        Both are called on one more thread, for they may block. Nothing is submitted from now on. The future is done when
        nothing is left.
        """
        released: asyncio.Future[None] = self._loop.create_future()

        def tell() -> None:
            if not released.done():
                released.set_result(None)

        def release() -> None:
            try:
                stop()
                self._join()
            finally:
                drop()
                self._to_loop(tell)

        threading.Thread(target=release, name=f"{self._name} release", daemon=True).start()
        return released

    def _join(self) -> None:
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()  # a daemon waits for daemons: the process may end before

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            outcome = _outcome(call.function)
            self._to_loop(self._done, call.on_done, outcome)
            del call, outcome  # what they hold may be let go of while this thread waits

    def _done(self, on_done: Callable[[Outcome], None], outcome: Outcome) -> None:
        self._num_busy -= 1
        on_done(outcome)

    def _to_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(callback, *arguments)


def _outcome(function: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(function(), None)
    except Exception as error:
        return Outcome(None, error.with_traceback(None))  # the frames would hold on to what is to be let go of
