"""The stages of the pipeline and who computes them: gathered, loaded, connected, and replaced when they are lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from asyncpipe.actors import ActorRef
from asyncpipe.cores import cpu_list, find_cores
from asyncpipe.errors import AsyncPipeError, Broken, Closed, Invalid, StageLost, Timeout
from asyncpipe.wire.links import LinkKind
from asyncpipe.wire.messages import ConnectNext, GetCounters, LoadStage, Ready, StageCounters
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.partition import LayerRange
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.shell.workers import OnProgress, Worker, WorkerSource
from asyncpipe_coordinator.tier_lines import tiers_text

log = logging.getLogger(__name__)

COUNTERS_TIMEOUT_S = 2.0
KV_SHARE = 0.5  # of the memory that is free when the layers are loaded, for all stages of one machine together
CONNECT_TIMEOUT_S = 60.0  # a worker needs 5 s to find that it cannot reach the next one, and may try a link for 35 s


@dataclass(slots=True)
class WorkerPool:
    """Brought up for one epoch after another. Who survives one keeps what it has loaded."""

    config: ServiceConfig
    layers: Sequence[LayerRange]
    model: ModelInfo
    dtype: str
    max_sequences: int  # in all micro-batches together
    source: WorkerSource
    on_progress: OnProgress
    epoch: int = 0
    workers: dict[int, Worker] = field(default_factory=dict)  # by stage
    is_ring: bool = True  # the last stage reaches the first, and tokens need not go through the coordinator

    async def bring_up(self, epoch: int) -> None:
        """Every stage has a worker, which has its layers, no sequences, and a link to the next stage, in a ring if that can be.

        Raises Invalid for what a worker found wrong; StageLost, Broken or Timeout for one that was lost meanwhile, which can
        be tried again.
        """
        self.epoch, self.is_ring = epoch, True
        if not self.workers:
            self._warn_of_crowding()
        if missing := [stage for stage in range(len(self.layers)) if stage not in self.workers]:
            self.workers |= await self.source.gather(missing)
        await self._on_all(self._load)
        await self._on_all(self._connect_next)

    def lose(self, stages: Sequence[int], error: AsyncPipeError) -> None:
        """They get other workers when the pipeline is brought up again."""
        for stage in stages:
            if (worker := self.workers.pop(stage, None)) is not None:
                self.source.discard(worker, error)

    def stage_of(self, ref: ActorRef) -> int | None:
        return next((stage for stage, worker in self.workers.items() if worker.ref == ref), None)

    @property
    def first(self) -> ActorRef:
        return self.workers[0].ref

    def describe(self, stage: int) -> str:
        """For error messages: "stage 1 of 3 (layers 2-3, pid 4711 on box-2)"."""
        worker, layers = self.workers.get(stage), self.layers[stage]
        who = f", {worker.name}" if worker is not None else ""
        return f"stage {stage} of {len(self.layers)} (layers {layers.first}-{layers.last - 1}{who})"

    def lost(self, stage: int, what: object) -> StageLost:
        return StageLost(f"{self.describe(stage)} was lost: {what}")

    @property
    def kv_blocks(self) -> int:
        """Of the stage with the least room."""
        return min(worker.report.kv_blocks for worker in self.workers.values() if worker.report is not None)

    @property
    def shares_memory(self) -> bool:
        """Whether two stages read their weights from the same memory: that of a GPU, or of a machine's processors."""
        joins = [worker.join for worker in self.workers.values() if worker.join.card or worker.join.device == "cpu"]
        return len({join.card or join.machine for join in joins}) < len(joins)

    async def counters(self) -> Mapping[int, StageCounters]:
        """By stage; those that do not answer in time are left out."""
        workers = dict(self.workers)
        found = await asyncio.gather(*map(_counters, workers.values()))
        return {stage: counters for stage, counters in zip(workers, found, strict=True) if counters is not None}

    async def _on_all(self, action: Callable[[int, Worker], Awaitable[None]]) -> None:
        """Run `action` for all stages at once. Those whose workers were lost meanwhile are given up; the first error is
        raised."""
        stages = dict(self.workers)
        results = await asyncio.gather(*itertools.starmap(action, stages.items()), return_exceptions=True)
        errors: list[BaseException] = []
        for stage, result in zip(stages, results, strict=True):
            if isinstance(result, Broken | Closed | Timeout):
                # StageLost is a worker's own word, of the one after it, which it cannot reach.
                missing = self._blamed(stage) if isinstance(result, StageLost) else stage
                errors.append(self.lost(missing, result))
                self.lose([missing], result)
            elif isinstance(result, BaseException):
                errors.insert(0, result)
        if errors:
            raise errors[0]

    def _blamed(self, stage: int) -> int:
        """Of two neighbours that do not reach each other: the later one, unless the earlier has not reached another either."""
        worker = self.workers.get(stage)
        if worker is None or worker.is_doubtful:
            return stage
        worker.is_doubtful = True
        return stage + 1

    async def _load(self, stage: int, worker: Worker) -> None:
        worker.report = await worker.ref.ask(self._plan(stage, worker), timeout=self.config.load_timeout_s)
        if where := tiers_text(worker.report.tiers):
            log.info("stage %d: %s", stage, where)
        self.on_progress(f"stage {stage} loaded")

    def _plan(self, stage: int, worker: Worker) -> LoadStage:
        config, layers = self.config, self.layers[stage]
        neighbours = self._num_on_machine(worker)
        previous = self.workers.get((stage - 1) % len(self.layers))
        cpus = config.cpus
        num_threads = config.threads_of(worker.join.num_cores, num_neighbours=neighbours)
        return LoadStage(
            epoch=self.epoch,
            stage=stage,
            num_stages=len(self.layers),
            first_layer=layers.first,
            last_layer=layers.last,
            checkpoint=str(config.checkpoint),
            model=config.model_name,
            device=config.device_of(stage) if config.workers_are_local else "",
            cpus=cpu_list(cpus[stage]) if cpus is not None else "",
            previous_key=previous.join.public_key if previous not in (None, worker) else "",
            config_json=msgspec.json.encode(self.model.config).decode(),
            dtype=self._dtype(),
            quantize=config.quantize or "",
            model_impl=config.model_impl,
            max_context_len=self.model.max_context_len,
            max_sequences=self.max_sequences,
            eos_token_ids=tuple(sorted(self.model.eos_token_ids)),
            num_threads=num_threads,
            machine_threads=self._machine_threads(worker, num_threads) if cpus is None else 0,
            kv_block_tokens=config.kv_block_tokens,
            kv_dtype=config.kv_dtype,
            kv_bytes=config.kv_bytes_of(stage),
            kv_share=KV_SHARE / neighbours,
            policy=config.policy_of(stage),
            offload_dir=str(config.offload_dir or ""),
            dummy_weights=config.dummy_weights,
        )

    def _link_wish(self, worker: Worker, following: Worker) -> str:
        """torch encrypts nothing: where there are keys, what leaves a machine travels in messages unless told otherwise."""
        is_secret = bool(following.join.public_key) and following.join.machine != worker.join.machine
        return LinkKind.ZMQ if self.config.link == "auto" and is_secret else self.config.link_wish

    def _num_on_machine(self, worker: Worker) -> int:
        """Stages on the same machine, itself included."""
        return sum(other.join.machine == worker.join.machine for other in self.workers.values())

    def _machine_threads(self, worker: Worker, num_threads: int) -> int:
        """Of all stages that compute on the same processors, as far as this one may use them; 0: of a GPU."""
        if worker.join.device != "cpu":
            return 0
        joins = [other.join for other in self.workers.values()]
        num_stages = sum((join.device, join.machine) == ("cpu", worker.join.machine) for join in joins)
        return min(num_stages * num_threads, worker.join.num_cores)

    def _dtype(self) -> str:
        """`auto` is the checkpoint's own on GPUs; CPUs compute most in float32, and all stages must have the same."""
        if self.dtype != "auto":
            return self.dtype
        is_on_cpus = any(worker.join.device == "cpu" for worker in self.workers.values())
        return "float32" if is_on_cpus else self.model.dtype

    def _warn_of_crowding(self) -> None:
        config = self.config
        if config.workers_are_local and config.oversubscribes:
            what = f"{config.num_stages} stages of {config.threads} threads"
            log.warning("%s share %d cores, and wait for each other: use fewer --threads-per-stage", what, find_cores().count)

    async def _connect_next(self, stage: int, worker: Worker) -> None:
        """The last stage's next is the first: by that way tokens need not go through the coordinator."""
        following = self.workers.get((stage + 1) % len(self.layers))
        message = ConnectNext(epoch=self.epoch, address=None)
        if following is not None and following is not worker:
            message = ConnectNext(
                epoch=self.epoch,
                address=following.join.address,
                public_key=following.join.public_key,
                link=self._link_wish(worker, following),
            )
        ready: Ready = await worker.ref.ask(message, timeout=CONNECT_TIMEOUT_S)
        if ready.stage != stage:
            raise Invalid(f"{self.describe(stage)} answers for stage {ready.stage}")
        worker.link, worker.is_doubtful = ready.link, False
        if not ready.obstacle:
            return
        if stage < len(self.layers) - 1:
            log.warning("hidden states of stage %d travel in its messages: %s", stage, ready.obstacle)
        else:
            self.is_ring = False
            log.warning("tokens reach stage 0 only through the coordinator, not from stage %d: %s", stage, ready.obstacle)


async def _counters(worker: Worker) -> StageCounters | None:
    try:
        return await worker.ref.ask(GetCounters(), timeout=COUNTERS_TIMEOUT_S)
    except AsyncPipeError:
        return None
