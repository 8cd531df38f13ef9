"""Collects the stages' spans while a command runs, on one clock, into a Chrome trace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
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


@dataclass(slots=True)
class _Source:
    """A stage's worker, what its clock is ahead of ours, and the number of its next span."""

    ref: ActorRef
    offset_ns: int
    next_span: int


class _Collector:
    def __init__(self, pool: WorkerPool, trace: ChromeTrace) -> None:
        self._pool = pool
        self._trace = trace
        self._sources: dict[int, _Source] = {}  # by stage

    async def begin(self) -> None:
        """Align the clocks; what was recorded before is not of interest."""
        workers = self._pool.workers
        offsets_ns = await asyncio.gather(*(clock_offset_ns(worker.ref) for worker in workers.values()))
        for (stage, worker), offset_ns in zip(workers.items(), offsets_ns, strict=True):
            self._sources[stage] = _Source(worker.ref, offset_ns, await _end_of_spans(worker.ref))

    async def run(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_EVERY_S)
            await self.collect()

    async def collect(self) -> None:
        for stage, worker in list(self._pool.workers.items()):
            try:
                await self._collect(stage, await self._source_of(stage, worker.ref))
            except AsyncPipeError as error:
                log.warning("the trace misses spans of stage %d: %s", stage, error)

    async def _source_of(self, stage: int, ref: ActorRef) -> _Source:
        """Another one when the stage has got another worker; all that this one has done is of interest."""
        source = self._sources.get(stage)
        if source is None or source.ref != ref:
            source = self._sources[stage] = _Source(ref, await clock_offset_ns(ref), 0)
        return source

    async def _collect(self, stage: int, source: _Source) -> None:
        while True:
            found = await source.ref.ask(GetSpans(first=source.next_span), timeout=ASK_TIMEOUT_S)
            if found.first > source.next_span:
                log.warning("the trace misses %d spans of stage %d", found.first - source.next_span, stage)
            try:
                self._trace.add(stage, found.spans, clock_offset_ns=source.offset_ns)
            except OSError as error:
                raise Invalid(f"cannot write the trace: {error.strerror or error}") from None
            source.next_span = found.first + len(found.spans)
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
