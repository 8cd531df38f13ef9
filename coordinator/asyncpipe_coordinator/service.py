"""A running coordinator: its actors, its workers, its addresses, from start to stop.

async with Service.open(config, bind="tcp://127.0.0.1:5550") as service:
    await service.run()  # until the pipeline is lost for good
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from asyncpipe.actors import ActorRef, ActorSystem
from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.transport.base import LinkOptions
from asyncpipe_coordinator.config import MAX_MICRO_BATCHES, ServiceConfig
from asyncpipe_coordinator.converted import usable_checkpoint
from asyncpipe_coordinator.core.limits import Limits
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.core.partition import split_layers
from asyncpipe_coordinator.model_files import BUNDLED_MODEL, ModelInfo, has_tokenizer, inspect_model
from asyncpipe_coordinator.planner.stages import with_derived_policies
from asyncpipe_coordinator.shell.coordinator import (
    COORDINATOR_ACTOR,
    TICK_S,
    CoordinatorActor,
    PipelineUp,
    Tick,
    WorkerLost,
)
from asyncpipe_coordinator.shell.pool import OnProgress, WorkerPool, say_nothing
from asyncpipe_coordinator.shell.status import STATUS_ACTOR, StatusActor
from asyncpipe_coordinator.shell.tracing import tracing
from asyncpipe_coordinator.text import TextCodec

log = logging.getLogger(__name__)

LOCAL_TIMEOUT_S = 5.0
LINKS = LinkOptions(window=2 * MAX_MICRO_BATCHES)  # a link to stage 0 never lacks credits: steps in flight are fewer


class Service:
    """Use `open`."""

    def __init__(self, config: ServiceConfig, *, system: ActorSystem, token: str, on_progress: OnProgress) -> None:
        self.model: ModelInfo = model_of(config)
        self.address = ""  # where clients connect, when `open` was given one
        self._layers = split_layers(self.model.num_layers, config.num_stages, config.split)
        self._dtype = dtype_of(config, self.model)
        self.config = with_derived_policies(config, self.model, layers=self._layers, dtype=self._dtype)
        self._system = system
        self._token = token
        self._on_progress = on_progress
        self._machine = self._make_machine()
        self._lost: asyncio.Future[AsyncPipeError] = asyncio.get_running_loop().create_future()
        self._actor = self._make_actor()
        self._ref: ActorRef = system.spawn(lambda: self._actor, name=COORDINATOR_ACTOR)
        self._pool: WorkerPool | None = None
        self._workers_address = ""
        self._epoch = 0
        self._starts: deque[float] = deque()
        system.spawn(self._make_status_actor, name=STATUS_ACTOR)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, config: ServiceConfig, *, bind: str | None = None, on_progress: OnProgress = say_nothing
    ) -> AsyncIterator[Service]:
        """Start the workers and load the model. Clients may connect to `bind` from the start; their requests wait.

        Raises Invalid for a bad model or split, StageLost for a worker that died, Timeout for one that is too slow. On exit
        every worker process is stopped and reaped.
        """
        token = secrets.token_hex(16)
        async with ActorSystem("coordinator", role="coordinator", token=token, options=LINKS) as system:
            service = cls(config, system=system, token=token, on_progress=on_progress)
            try:
                if bind is not None:
                    service.address = await service.listen(bind)
                await service._convert()
                await service._start_pool()
                service._actor.background(service._tick(), name="tick")
                yield service
            finally:
                await service._stop_pool()

    async def listen(self, address: str) -> str:
        """Take clients at `address`; returns it with the real port. Raises Invalid for a bad address or one in use."""
        return await self._system.listen(address, token="")

    def tracing(self, path: str | None) -> contextlib.AbstractAsyncContextManager[None]:
        """Write what the stages do within the block as a Chrome trace; None is no trace. Raises Invalid for a bad path."""
        assert self._pool is not None  # noqa: S101 - `open` has started one
        return tracing(self._pool, None if path is None else Path(path))

    async def run(self) -> None:
        """Serve. A lost pipeline is started again, `max_restarts` times within `restart_period_s`; then its error is raised."""
        while True:
            error = await self._lost  # no deadline: serving has none
            self._lost = asyncio.get_running_loop().create_future()
            log.error("%s", error)
            if not self._may_start_again():
                raise error
            await self._stop_pool()
            await self._start_pool()
            log.warning("the pipeline is up again, epoch %d", self._epoch)

    async def _convert(self) -> None:
        """What cannot be read in place is, once, made into what can."""
        path = await usable_checkpoint(
            self.config, self.model, on_progress=lambda share: self._on_progress(f"converting, {share:.0%} done", steps=0)
        )
        self.config = replace(self.config, checkpoint=path)

    async def _start_pool(self) -> None:
        self._epoch += 1
        epoch = self._epoch
        self._starts.append(time.monotonic())
        if not self._workers_address:
            self._workers_address = await self._system.listen(f"ipc://@asyncpipe-{secrets.token_hex(8)}")
        self._pool = pool = WorkerPool(
            config=self.config,
            layers=self._layers,
            model=self.model,
            dtype=self._dtype,
            max_sequences=self._machine.limits.max_sequences,
            address=self._workers_address,
            token=self._token,
            epoch=epoch,
            background=lambda work, name: self._actor.background(work, name=name),
            on_loss=lambda _stage, error: self._ref.signal(WorkerLost(epoch, error)),
            on_progress=self._on_progress,
        )
        self._actor.expect(pool)
        await pool.start()
        gc.freeze()  # what is here now stays: no collection need look at it again
        await self._ref.tell(PipelineUp(pool), timeout=LOCAL_TIMEOUT_S)

    async def _stop_pool(self) -> None:
        if self._pool is not None:
            await self._pool.stop()

    def _may_start_again(self) -> bool:
        """OTP's rule: more than `max_restarts` within the period means that starting again does not help."""
        oldest_s = time.monotonic() - self.config.restart_period_s
        while self._starts and self._starts[0] < oldest_s:
            self._starts.popleft()
        return len(self._starts) <= self.config.max_restarts

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._ref.signal(Tick())

    def _on_pipeline_lost(self, error: AsyncPipeError) -> None:
        if not self._lost.done():
            self._lost.set_result(error)

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
    model = inspect_model(config.checkpoint, dummy=config.dummy_weights, native=config.model_impl == "native")
    simulation = config.simulation
    if simulation is None:
        return model
    own_layers = config.num_stages if config.checkpoint == BUNDLED_MODEL else model.num_layers
    shape = replace(model.shape, num_layers=simulation.layers or own_layers, max_context_len=simulation.context)
    return replace(model, shape=shape, eos_token_ids=frozenset())


def dtype_of(config: ServiceConfig, model: ModelInfo) -> str:
    """`auto` is float32 on CPUs, which most compute fastest in it, and the checkpoint's own on a GPU."""
    if config.dtype != "auto":
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
