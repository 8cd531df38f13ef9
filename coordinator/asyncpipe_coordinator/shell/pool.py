"""The worker processes of this machine: started, joined, loaded, connected, watched and stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from asyncpipe.actors import ActorRef
from asyncpipe.cores import cpu_list, find_cores
from asyncpipe.errors import AsyncPipeError, Broken, Invalid, StageLost
from asyncpipe.errors import Timeout as DeadlinePassed
from asyncpipe.process import ChildProcess
from asyncpipe.wire.messages import (
    ConnectNext,
    GetCounters,
    Join,
    LoadStage,
    Ready,
    StageCounters,
    StageReport,
)
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.partition import LayerRange
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.tier_lines import tiers_text

log = logging.getLogger(__name__)

COUNTERS_TIMEOUT_S = 2.0
KV_SHARE = 0.5  # of the memory that is free when the layers are loaded, for all stages of this machine together
# Turns (a tenth of a millisecond) that a compute thread waits for the others before it sleeps. libgomp's own default is
# milliseconds, in which a thread that spins keeps off the core the one it waits for, when other programs need that core too.
SPIN_COUNT = "2500"
# For glibc's malloc, which otherwise gives back what one layer has freed, to fault it in again, page by page, for the next one.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # its greatest
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
CONNECT_TIMEOUT_S = 15.0
USAGE_EXIT = 2

T = TypeVar("T")
OnLoss = Callable[[int, AsyncPipeError], None]


class OnProgress(Protocol):
    def __call__(self, what: str, *, steps: int = 1) -> None:
        """`what` has happened, which is `steps` of the start's."""
        ...


def say_nothing(what: str, *, steps: int = 1) -> None:
    """For starts that nobody watches."""


@dataclass(slots=True)
class Worker:
    """One worker process; its slot is its stage."""

    stage: int
    process: ChildProcess
    joined: asyncio.Future[Join]
    ref: ActorRef | None = None
    join: Join | None = None
    report: StageReport | None = None


@dataclass(slots=True)
class WorkerPool:
    """The workers of one epoch. `start` brings them up, `stop` leaves no process behind."""

    config: ServiceConfig
    layers: Sequence[LayerRange]
    model: ModelInfo
    dtype: str
    max_sequences: int  # in all micro-batches together
    address: str  # where workers find the coordinator
    token: str
    epoch: int
    background: Callable[[Coroutine[Any, Any, None], str], None]
    on_loss: OnLoss
    on_progress: OnProgress = say_nothing
    workers: list[Worker] = field(default_factory=list)
    _stopping: bool = False

    async def start(self) -> None:
        """Raises Invalid for what a worker found wrong, StageLost when one died, Timeout when one was too slow."""
        config = self.config
        if config.oversubscribes:
            what = f"{config.num_stages} stages of {config.threads} threads"
            log.warning("%s share %d cores, and wait for each other: use fewer --threads-per-stage", what, find_cores().count)
        for stage in range(config.num_stages):
            self.workers.append(await self._spawn(stage))
        for worker in self.workers:
            worker.join = await self._await_join(worker)
            self.on_progress(f"stage {worker.stage} joined")
        await self._on_all(self._load)
        await self._on_all(self._connect_next)

    async def stop(self) -> None:
        """TERM, then KILL, for every worker at once; returns when all are reaped."""
        self._stopping = True
        await asyncio.gather(*(worker.process.stop() for worker in self.workers))

    def on_join(self, join: Join, sender: ActorRef) -> None:
        """Raises Invalid for a worker that was not started here."""
        worker = self.workers[join.slot] if join.slot < len(self.workers) else None
        if worker is None or worker.joined.done() or worker.process.pid != join.pid:
            raise Invalid(f"no worker was expected in slot {join.slot} with pid {join.pid}")
        worker.ref = sender
        worker.joined.set_result(join)

    def stage_of(self, ref: ActorRef) -> int | None:
        return next((worker.stage for worker in self.workers if worker.ref == ref), None)

    @property
    def first(self) -> ActorRef:
        return _joined_ref(self.workers[0])

    def describe(self, stage: int) -> str:
        """For error messages: "stage 1 of 3 (layers 2-3, worker pid 4711)"."""
        worker, layers = self.workers[stage], self.layers[stage]
        last = layers.last - 1
        return f"stage {stage} of {len(self.workers)} (layers {layers.first}-{last}, worker pid {worker.process.pid})"

    def lost(self, stage: int, what: object) -> StageLost:
        return StageLost(f"{self.describe(stage)} was lost: {what}")

    @property
    def kv_blocks(self) -> int:
        """Of the stage with the least room."""
        return min(worker.report.kv_blocks for worker in self.workers if worker.report is not None)

    async def counters(self) -> tuple[StageCounters | None, ...]:
        """One entry a stage; None where it did not answer in time."""
        return tuple(await asyncio.gather(*(self._counters(worker) for worker in self.workers)))

    async def _spawn(self, stage: int) -> Worker:
        config = self.config
        argv = [sys.executable, "-m", "asyncpipe_workers"]
        argv += ["--coordinator", self.address, "--slot", str(stage), "--device", config.device_of(stage)]
        if (cpus := config.cpus) is not None:
            argv += ["--cpus", cpu_list(cpus[stage])]
        env = os.environ | {
            "ASYNCPIPE_TOKEN": self.token,
            "OMP_NUM_THREADS": str(config.threads),
        }
        if "OMP_WAIT_POLICY" not in env:
            env.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        if not config.moves_weights:  # whoever streams them counts every byte
            env = KEEP_FREED_MEMORY | env
        process = await ChildProcess.spawn(argv, env=env, name=f"stage {stage}")
        worker = Worker(stage, process, asyncio.get_running_loop().create_future())
        self.background(self._watch(worker), f"watch stage {stage}")
        return worker

    async def _watch(self, worker: Worker) -> None:
        await worker.process.wait()
        error = _exit_error(worker)
        if not worker.joined.done():
            worker.joined.set_exception(error)
            worker.joined.exception()  # whoever waits raises it; nobody waiting is no leak
        if not self._stopping:
            self.on_loss(worker.stage, error)

    async def _await_join(self, worker: Worker) -> Join:
        try:
            async with asyncio.timeout(self.config.join_timeout_s):
                return await asyncio.shield(worker.joined)
        except TimeoutError:
            raise DeadlinePassed(
                f"the worker of stage {worker.stage} (pid {worker.process.pid}) did not join within"
                f" {self.config.join_timeout_s:g} s{_tail(worker)}"
            ) from None

    async def _on_all(self, action: Callable[[Worker], Awaitable[None]]) -> None:
        """Run `action` on all workers at once; the first error, named by its stage, is raised."""
        results = await asyncio.gather(*(action(worker) for worker in self.workers), return_exceptions=True)
        for worker, result in zip(self.workers, results, strict=True):
            if isinstance(result, Broken):
                raise self.lost(worker.stage, result)
            if isinstance(result, BaseException):
                raise result

    async def _load(self, worker: Worker) -> None:
        layers = self.layers[worker.stage]
        plan = LoadStage(
            epoch=self.epoch,
            stage=worker.stage,
            num_stages=len(self.workers),
            first_layer=layers.first,
            last_layer=layers.last,
            checkpoint=str(self.config.checkpoint),
            config_json=msgspec.json.encode(self.model.config).decode(),
            dtype=self.dtype,
            quantize=self.config.quantize or "",
            model_impl=self.config.model_impl,
            max_context_len=self.model.max_context_len,
            max_sequences=self.max_sequences,
            eos_token_ids=tuple(sorted(self.model.eos_token_ids)),
            num_threads=self.config.threads,
            kv_block_tokens=self.config.kv_block_tokens,
            kv_bytes=self.config.kv_bytes_of(worker.stage),
            kv_share=KV_SHARE / len(self.workers),
            policy=self.config.policy_of(worker.stage),
            offload_dir=str(self.config.offload_dir or ""),
            dummy_weights=self.config.dummy_weights,
        )
        worker.report = await _joined_ref(worker).ask(plan, timeout=self.config.load_timeout_s)
        if where := tiers_text(worker.report.tiers):
            log.info("stage %d: %s", worker.stage, where)
        self.on_progress(f"stage {worker.stage} loaded")

    async def _connect_next(self, worker: Worker) -> None:
        following = self.workers[worker.stage + 1] if worker.stage + 1 < len(self.workers) else None
        address = following.join.address if following and following.join else None
        ready: Ready = await _joined_ref(worker).ask(ConnectNext(epoch=self.epoch, address=address), timeout=CONNECT_TIMEOUT_S)
        assert ready.stage == worker.stage  # noqa: S101 - a worker answers for itself or not at all

    async def _counters(self, worker: Worker) -> StageCounters | None:
        if worker.ref is None:
            return None
        try:
            return await worker.ref.ask(GetCounters(), timeout=COUNTERS_TIMEOUT_S)
        except AsyncPipeError:
            return None


def _joined_ref(worker: Worker) -> ActorRef:
    if worker.ref is None:
        raise Broken(f"the worker of stage {worker.stage} has not joined")
    return worker.ref


def _exit_error(worker: Worker) -> AsyncPipeError:
    returncode = worker.process.returncode
    if returncode == USAGE_EXIT:
        return Invalid(f"the worker of stage {worker.stage} could not start: {_last_line(worker)}")
    return StageLost(
        f"the worker of stage {worker.stage} (pid {worker.process.pid}) {worker.process.describe_exit()}{_tail(worker)}"
    )


def _last_line(worker: Worker) -> str:
    lines = worker.process.stderr_tail()
    return lines[-1].removeprefix("asyncpipe-worker: error: ") if lines else "it said nothing"


def _tail(worker: Worker) -> str:
    lines = worker.process.stderr_tail()
    return "; its last lines:\n  " + "\n  ".join(lines) if lines else ""
