"""A running coordinator: its actors, its workers, its addresses, from start to stop.

async with Service.open(config, bind="tcp://127.0.0.1:5550") as service:
    await service.run()  # until it does not help to replace lost stages
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from asyncpipe.actors import ActorRef, ActorSystem
from asyncpipe.errors import AsyncPipeError, Broken, Invalid, StageLost
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe.transport.base import LinkOptions
from asyncpipe.transport.keys import Keys
from asyncpipe_coordinator.config import MAX_MICRO_BATCHES, ServiceConfig
from asyncpipe_coordinator.converted import usable_checkpoint
from asyncpipe_coordinator.core.limits import Limits
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.core.partition import split_layers
from asyncpipe_coordinator.model_files import ModelInfo, has_tokenizer, inspect_model
from asyncpipe_coordinator.planner.stages import with_derived_policies
from asyncpipe_coordinator.shell.coordinator import (
    COORDINATOR_ACTOR,
    TICK_S,
    CoordinatorActor,
    Loss,
    PipelineGone,
    PipelineUp,
    Tick,
    WorkerLost,
)
from asyncpipe_coordinator.shell.external_workers import ExternalWorkers, join_hint
from asyncpipe_coordinator.shell.local_workers import LocalWorkers
from asyncpipe_coordinator.shell.pool import WorkerPool
from asyncpipe_coordinator.shell.status import STATUS_ACTOR, StatusActor
from asyncpipe_coordinator.shell.tracing import tracing
from asyncpipe_coordinator.shell.workers import OnProgress, WorkerSource, say_nothing
from asyncpipe_coordinator.text import TextCodec

log = logging.getLogger(__name__)

LOCAL_TIMEOUT_S = 5.0
LINKS = LinkOptions(window=2 * MAX_MICRO_BATCHES)  # a link to stage 0 never lacks credits: steps in flight are fewer


@dataclass(frozen=True, slots=True)
class Security:
    """Who may reach the addresses that are not of this machine alone: whom `keys` let in; without them nobody, unless
    `insecure`, and then everybody."""

    keys: Keys | None = None
    insecure: bool = False


NO_KEYS = Security()


class Service:
    """Use `open`."""

    def __init__(self, config: ServiceConfig, *, system: ActorSystem, token: str, on_progress: OnProgress) -> None:
        self.model: ModelInfo = model_of(config)
        self.address = ""  # where clients connect, when `open` was given one
        self._layers = split_layers(self.model.num_layers, config.num_stages, config.split)
        self._dtype = dtype_of(config, self.model)
        expected_dtype = self.model.dtype if self._dtype == "auto" else self._dtype
        self.config = with_derived_policies(config, self.model, layers=self._layers, dtype=expected_dtype)
        self._system = system
        self._on_progress = on_progress
        self._machine = self._make_machine()
        self._losses: asyncio.Queue[Loss] = asyncio.Queue(1)
        self._gone: asyncio.Future[AsyncPipeError] = asyncio.get_running_loop().create_future()
        self._actor = self._make_actor()
        self._ref: ActorRef = system.spawn(lambda: self._actor, name=COORDINATOR_ACTOR)
        self._workers_address = f"ipc://@asyncpipe-{secrets.token_hex(8)}"
        self._pool = self._make_pool(token)
        self._epoch = time.time_ns() // 1_000_000  # no coordinator before this one has had one so high
        self._losses_at_s: deque[float] = deque()
        system.spawn(self._make_status_actor, name=STATUS_ACTOR)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        config: ServiceConfig,
        *,
        bind: str | None = None,
        security: Security = NO_KEYS,
        on_progress: OnProgress = say_nothing,
    ) -> AsyncIterator[Service]:
        """Start the workers and load the model. Clients may connect to `bind` from the start; their requests wait.

        Raises Invalid for a bad model or split, StageLost for a worker that died, Timeout for one that is too slow. On exit
        every worker process is stopped and reaped.
        """
        token = secrets.token_hex(16)
        options = replace(LINKS, keys=security.keys, insecure=security.insecure)
        async with ActorSystem("coordinator", role="coordinator", token=token, options=options) as system:
            service = cls(config, system=system, token=token, on_progress=on_progress)
            try:
                if bind is not None:
                    service.address = await service.listen(bind)
                await service._start(security)
                yield service
            finally:
                service._actor.use(None)
                await service._pool.source.stop()

    async def listen(self, address: str) -> str:
        """Take clients at `address`; returns it with the real port. Raises Invalid for a bad address or one in use."""
        return await self._system.listen(address, token="")

    def tracing(self, path: str | None) -> contextlib.AbstractAsyncContextManager[None]:
        """Write what the stages do within the block as a Chrome trace; None is no trace. Raises Invalid for a bad path."""
        return tracing(self._pool, None if path is None else Path(path))

    async def run(self) -> None:
        """Serve. Lost stages are replaced, `max_restarts` times within `restart_period_s`; then the last one's error is
        raised."""
        raise await asyncio.shield(self._gone)  # no deadline: serving has none

    async def _start(self, security: Security) -> None:
        self._actor.use(self._pool)
        if self.config.workers_are_local:
            await self._convert()
            await self._system.listen(self._workers_address)
        else:
            self._on_progress(join_hint(self.config, self.address, with_keys=security.keys is not None), steps=0)
        try:
            await self._bring_up()
        except Broken as error:
            if self.config.workers_are_local:
                raise
            await self._replace((), error)  # another one may come
        gc.freeze()  # what is here now stays: no collection need look at it again
        self._actor.background(self._supervise(), name="supervise")
        self._actor.background(self._tick(), name="tick")

    async def _supervise(self) -> None:
        while not self._gone.done():
            loss = await self._losses.get()
            try:
                await self._replace(loss.stages, loss.error)
            except AsyncPipeError as error:
                gone = error if isinstance(error, StageLost) else StageLost(f"a lost stage could not be replaced: {error}")
                self._gone.set_result(gone)
                await self._ref.tell(PipelineGone(gone), timeout=LOCAL_TIMEOUT_S)

    async def _replace(self, stages: Sequence[int], error: AsyncPipeError) -> None:
        """Raises the last error when it has not helped often enough, or cannot help."""
        self._pool.lose(stages, error)
        while True:
            log.error("%s", error)
            if not self._may_start_again():
                raise error
            try:
                await self._bring_up()
            except Broken as again:
                error = again
            else:
                log.warning("the pipeline is up again; %d requests go on", self._machine.statistics().open)
                return

    async def _bring_up(self) -> None:
        self._epoch += 1
        await self._pool.bring_up(self._epoch)
        await self._ref.tell(PipelineUp(self._epoch), timeout=LOCAL_TIMEOUT_S)

    async def _convert(self) -> None:
        """What cannot be read in place is, once, made into what can."""
        path = await usable_checkpoint(
            self.config, self.model, on_progress=lambda share: self._on_progress(f"converting, {share:.0%} done", steps=0)
        )
        self.config = self._pool.config = replace(self.config, checkpoint=path)

    def _may_start_again(self) -> bool:
        """OTP's rule: more than `max_restarts` within the period means that starting again does not help."""
        now_s = time.monotonic()
        self._losses_at_s.append(now_s)
        while self._losses_at_s[0] < now_s - self.config.restart_period_s:
            self._losses_at_s.popleft()
        return len(self._losses_at_s) <= self.config.max_restarts

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._ref.signal(Tick())

    def _on_pipeline_lost(self, loss: Loss) -> None:
        """Once an epoch, so there is room."""
        self._losses.put_nowait(loss)

    def _make_pool(self, token: str) -> WorkerPool:
        return WorkerPool(
            config=self.config,
            layers=self._layers,
            model=self.model,
            dtype=self._dtype,
            max_sequences=self._machine.limits.max_sequences,
            source=self._make_source(token),
            on_progress=self._on_progress,
        )

    def _make_source(self, token: str) -> WorkerSource:
        if not self.config.workers_are_local:
            timeout_s = self.config.join_deadline_s
            return ExternalWorkers(join_timeout_s=timeout_s, drop=self._system.lose, on_progress=self._on_progress)
        return LocalWorkers(
            self.config,
            address=self._workers_address,
            token=token,
            background=lambda work, name: self._actor.background(work, name=name),
            on_loss=lambda worker, error: self._ref.signal(WorkerLost(worker, error)),
            on_progress=self._on_progress,
        )

    def _make_machine(self) -> Machine:
        return Machine(
            Limits(
                num_stages=self.config.num_stages,
                num_micro_batches=self.config.num_micro_batches,
                max_sequences_per_micro_batch=self.config.micro_batch_sequences,
                max_waiting=self.config.max_waiting,
                max_context_len=self.model.max_context_len,
                max_step_tokens=self.config.step_tokens,
                kv_block_tokens=self.config.kv_block_tokens,
                eos_token_ids=self.model.eos_token_ids,
                # Where each step is a pass over weights that move, few large steps are best.
                prefill_spread_steps=1 if self.config.moves_weights else 8,
                schedule=self.config.schedule,
            )
        )

    def _make_actor(self) -> CoordinatorActor:
        return CoordinatorActor(
            machine=self._machine,
            codec=TextCodec.load(tokenizer_path(self.config, self.model)),
            model=self.model,
            step_timeout_s=self.config.step_deadline_s,
            on_pipeline_lost=self._on_pipeline_lost,
        )

    def _make_status_actor(self) -> StatusActor:
        return StatusActor(self._actor, machine=self._machine, model_name=self.model.path.name)


def model_of(config: ServiceConfig) -> ModelInfo:
    """What is run. A simulation without a MODEL has as many layers as stages. Raises Invalid."""
    is_elsewhere = config.dummy_weights or not config.workers_are_local
    model = inspect_model(config.checkpoint, dummy=is_elsewhere, native=config.model_impl == "native")
    simulation = config.simulation
    if simulation is None:
        return model
    own_layers = config.num_stages if config.checkpoint == BUNDLED_MODEL else model.num_layers
    shape = replace(model.shape, num_layers=simulation.layers or own_layers, max_context_len=simulation.context)
    return replace(model, shape=shape, eos_token_ids=frozenset())


def dtype_of(config: ServiceConfig, model: ModelInfo) -> str:
    """`auto` is float32 on CPUs, which most compute fastest in it, and the checkpoint's own on a GPU. External workers have to
    come first."""
    if config.dtype != "auto" or not config.workers_are_local:
        return config.dtype
    return "float32" if config.device == "cpu" else model.dtype


def tokenizer_path(config: ServiceConfig, model: ModelInfo) -> Path:
    """Where the tokenizer is: with dummy weights, whose texts mean nothing, the bundled model's will do. Raises Invalid."""
    if not config.dummy_weights or has_tokenizer(config.checkpoint):
        return config.checkpoint
    bundled = inspect_model(BUNDLED_MODEL).vocab_size
    if model.vocab_size < bundled:
        raise Invalid(
            f"{config.checkpoint} has no tokenizer, and its vocabulary of {model.vocab_size} is too small for the bundled"
            f" model's of {bundled}: add a tokenizer.json"
        )
    return BUNDLED_MODEL
