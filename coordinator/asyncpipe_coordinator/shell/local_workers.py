"""Workers as child processes on this machine: started, joined, watched, replaced and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from asyncpipe.actors import ActorRef
from asyncpipe.errors import AsyncPipeError, Closed, Invalid, StageLost
from asyncpipe.errors import Timeout as DeadlinePassed
from asyncpipe.process import ChildProcess
from asyncpipe.wire.messages import Join
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.shell.workers import OnLoss, OnProgress, Worker

log = logging.getLogger(__name__)

USAGE_EXIT = 2
FILL_UP_AFTER_S = 1.0  # the pipeline comes first, and spares that cannot live must not keep the machine busy
LAST_WORDS_S = 0.2  # for a lost worker to end by itself, before it is killed


@dataclass(slots=True, eq=False)
class _Started:
    """A process that has been started, and the worker it becomes."""

    slot: int
    process: ChildProcess
    worker: asyncio.Future[Worker]


class LocalWorkers:
    """A `WorkerSource`. `background` runs what watches the processes; `on_loss` hears of those that are some stage's."""

    def __init__(
        self,
        config: ServiceConfig,
        *,
        address: str,
        token: str,
        background: Callable[[Coroutine[Any, Any, None], str], None],
        on_loss: OnLoss,
        on_progress: OnProgress,
    ) -> None:
        self._config = config
        self._address = address
        self._token = token
        self._background = background
        self._on_loss = on_loss
        self._on_progress = on_progress
        self._slots = itertools.count()
        self._started: dict[int, _Started] = {}
        self._spares: list[_Started] = []
        self._stopping = False

    async def gather(self, stages: Collection[int]) -> Mapping[int, Worker]:
        """Spares first, then new processes, all started at once. The spares that are used up are replaced meanwhile."""
        chosen = {stage: self._spares.pop() if self._spares else await self._start(stage) for stage in stages}
        try:
            return {stage: await self._joined(started, stage) for stage, started in chosen.items()}
        except AsyncPipeError:
            self._spares += [started for started in chosen.values() if not _has_failed(started)]
            raise
        finally:
            self._background(self._fill_up(), "start spare workers")

    def discard(self, worker: Worker, error: AsyncPipeError) -> None:
        """It may be frozen or busy, so it gets little time."""
        if worker.process is not None:
            self._background(worker.process.stop(kill_after_s=LAST_WORDS_S), f"stop {worker.name}")

    def on_join(self, join: Join, sender: ActorRef) -> None:
        started = None if join.slot is None else self._started.get(join.slot)
        if started is None or started.worker.done() or started.process.pid != join.pid:
            raise Invalid(f"no worker was expected in slot {join.slot} with pid {join.pid}")
        started.worker.set_result(Worker(join, sender, started.process))

    def on_down(self, ref: ActorRef, error: AsyncPipeError) -> None:
        """A spare that has frozen ends; the rest is its watch's business."""
        for started in [started for started in self._spares if _ref(started) == ref]:
            self._spares.remove(started)
            self._background(started.process.stop(kill_after_s=LAST_WORDS_S), "stop a spare worker")

    @property
    def num_spares(self) -> int:
        return len(self._spares)

    async def stop(self) -> None:
        """TERM, then KILL, for every process at once; returns when all are reaped."""
        self._stopping = True
        await asyncio.gather(*(started.process.stop() for started in list(self._started.values())))

    async def _fill_up(self) -> None:
        await asyncio.sleep(FILL_UP_AFTER_S)
        with contextlib.suppress(Closed):
            while len(self._spares) < self._config.spares and not self._stopping:
                self._spares.append(await self._start(stage=0))

    async def _start(self, stage: int) -> _Started:
        slot = next(self._slots)
        argv = [sys.executable, "-m", "asyncpipe_workers"]
        argv += ["--coordinator", self._address, "--slot", str(slot), "--device", self._config.device_of(stage)]
        process = await ChildProcess.spawn(argv, env=self._environment(), name=f"worker {slot}")
        if self._stopping:
            await process.stop()
            raise Closed("the workers are being stopped")
        started = self._started[slot] = _Started(slot, process, asyncio.get_running_loop().create_future())
        self._background(self._watch(started), f"watch worker {slot}")
        return started

    def _environment(self) -> Mapping[str, str]:
        return os.environ | {"ASYNCPIPE_TOKEN": self._token, "OMP_NUM_THREADS": str(self._config.threads)}

    async def _watch(self, started: _Started) -> None:
        await started.process.wait()
        del self._started[started.slot]
        if started in self._spares:
            self._spares.remove(started)
            self._background(self._fill_up(), "start spare workers")
        error = exit_error(started.process)
        if not self._stopping:
            log.warning("a worker has ended: %s", error)
        if not started.worker.done():
            started.worker.set_exception(error)
            started.worker.exception()  # whoever waits raises it; nobody waiting is no leak
        elif not self._stopping:
            self._on_loss(started.worker.result(), error)

    async def _joined(self, started: _Started, stage: int) -> Worker:
        try:
            async with asyncio.timeout(self._config.join_deadline_s):
                worker = await asyncio.shield(started.worker)
        except TimeoutError:
            raise DeadlinePassed(
                f"the worker of stage {stage} (pid {started.process.pid}) did not join within"
                f" {self._config.join_deadline_s:g} s{_tail(started.process)}"
            ) from None
        self._on_progress(f"stage {stage} joined")
        return worker


def exit_error(process: ChildProcess) -> AsyncPipeError:
    """How it has ended: by its own complaint, or lost."""
    if process.returncode == USAGE_EXIT:
        return Invalid(f"a worker could not start: {_last_line(process)}")
    return StageLost(f"pid {process.pid} {process.describe_exit()}{_tail(process)}")


def _has_failed(started: _Started) -> bool:
    """It has ended, or was awaited for too long."""
    return not started.worker.done() or started.worker.exception() is not None


def _ref(started: _Started) -> ActorRef | None:
    return None if _has_failed(started) else started.worker.result().ref


def _last_line(process: ChildProcess) -> str:
    lines = process.stderr_tail()
    return lines[-1].removeprefix("asyncpipe-worker: error: ") if lines else "it said nothing"


def _tail(process: ChildProcess) -> str:
    lines = process.stderr_tail()
    return "; its last lines:\n  " + "\n  ".join(lines) if lines else ""
