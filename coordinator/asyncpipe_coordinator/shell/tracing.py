"""Collects the stages' spans while a command runs, on one clock, into a Chrome trace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

from asyncpipe.actors import ActorRef
from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.trace import ChromeTrace
from asyncpipe.wire.messages import GetClock, GetSpans
from asyncpipe.wire.stage_messages import MAX_SPANS_PER_MESSAGE
from asyncpipe_coordinator.shell.pool import WorkerPool

COLLECT_EVERY_S = 1.0
ASK_TIMEOUT_S = 5.0
CLOCK_TRIES = 8

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def tracing(pool: WorkerPool, path: Path | None) -> AsyncIterator[None]:
    """Everything that the stages record within the block goes to `path`; None is no trace. Raises Invalid for a bad path."""
    if path is None:
        yield
        return
    layers = [f"stage {stage} (layers {first}-{last - 1})" for stage, (first, last) in enumerate(pool.layers)]
    with ChromeTrace(path, stage_names=layers) as trace:
        collector = _Collector(pool, trace)
        await collector.begin()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(collector.run(), name="trace")
            try:
                yield
            finally:
                task.cancel()
        await collector.collect()


class _Collector:
    def __init__(self, pool: WorkerPool, trace: ChromeTrace) -> None:
        self._stages = [worker.ref for worker in pool.workers if worker.ref is not None]
        self._trace = trace
        self._next = [0] * len(self._stages)
        self._offsets_ns = [0] * len(self._stages)

    async def begin(self) -> None:
        """Align the clocks; what was recorded before is not of interest."""
        self._offsets_ns = list(await asyncio.gather(*(clock_offset_ns(stage) for stage in self._stages)))
        for index, stage in enumerate(self._stages):
            self._next[index] = await _end_of_spans(stage)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_EVERY_S)
            await self.collect()

    async def collect(self) -> None:
        for index, stage in enumerate(self._stages):
            try:
                await self._collect(index, stage)
            except AsyncPipeError as error:
                log.warning("the trace misses spans of stage %d: %s", index, error)

    async def _collect(self, index: int, stage: ActorRef) -> None:
        while True:
            found = await stage.ask(GetSpans(first=self._next[index]), timeout=ASK_TIMEOUT_S)
            if found.first > self._next[index]:
                log.warning("the trace misses %d spans of stage %d", found.first - self._next[index], index)
            try:
                self._trace.add(index, found.spans, clock_offset_ns=self._offsets_ns[index])
            except OSError as error:
                raise Invalid(f"cannot write the trace: {error.strerror or error}") from None
            self._next[index] = found.first + len(found.spans)
            if len(found.spans) < MAX_SPANS_PER_MESSAGE:
                return


async def clock_offset_ns(stage: ActorRef) -> int:
    """What the stage's clock is ahead of ours: from the quickest of several exchanges, as NTP does (RFC 5905)."""
    best_ns, offset_ns = 1 << 62, 0
    for _ in range(CLOCK_TRIES):
        start_ns = time.monotonic_ns()
        reading = await stage.ask(GetClock(), timeout=ASK_TIMEOUT_S)
        end_ns = time.monotonic_ns()
        if end_ns - start_ns < best_ns:
            best_ns, offset_ns = end_ns - start_ns, reading.monotonic_ns - (start_ns + end_ns) // 2
    return offset_ns


async def _end_of_spans(stage: ActorRef) -> int:
    first = 0
    while True:
        found = await stage.ask(GetSpans(first=first), timeout=ASK_TIMEOUT_S)
        first = found.first + len(found.spans)
        if len(found.spans) < MAX_SPANS_PER_MESSAGE:
            return first
