"""The stage actor: takes steps in order, computes them on the compute thread, passes them on.

It decides nothing about requests. The coordinator says what to load and where the next stage listens; from then on a step
arrives, its delta is applied, its layers are computed, and hidden states go to the next stage or tokens to the coordinator.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from asyncpipe.actors import Actor, ActorRef, Down
from asyncpipe.errors import AsyncPipeError, Broken, Invalid, to_data
from asyncpipe.wire.messages import (
    ConnectNext,
    GetCounters,
    LoadStage,
    Message,
    Ready,
    StageCounters,
    StageFailed,
    StageReport,
    Step,
    Tokens,
    ToStage,
)
from asyncpipe.wire.tensors import Tensor
from asyncpipe_workers.executor import ComputeThread

STAGE_ACTOR = "stage"
SEND_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class StageOutput(Protocol):
    """`hidden` (T, D) except on the last stage, which gives `token_ids` instead."""

    @property
    def hidden(self) -> Tensor | None: ...

    @property
    def token_ids(self) -> tuple[int, ...]: ...


class StageCompute(Protocol):
    """What a stage drives: a model's layers, or anything that takes steps."""

    @property
    def num_params(self) -> int: ...

    @property
    def param_bytes(self) -> int: ...

    def step(self, message: Step) -> StageOutput: ...


Loader = Callable[[LoadStage], StageCompute]


class StageActor(Actor):
    """One stage of the pipeline."""

    receives: ClassVar[Any] = ToStage
    mailbox_capacity: ClassVar[int] = 64

    def __init__(self, *, coordinator: ActorRef, loader: Loader, lost: asyncio.Future[None]) -> None:
        self._coordinator = coordinator
        self._loader = loader
        self._lost = lost  # completed when the coordinator is gone and this process has no more to do
        self._compute = ComputeThread()
        self._plan: LoadStage | None = None
        self._model: StageCompute | None = None
        self._next: ActorRef | None = None

    async def started(self) -> None:
        self.system.monitor(self._coordinator, watcher=self.ref)

    async def stopped(self) -> None:
        self._compute.close()

    async def handle(self, message: Message | Down) -> Message | None:
        match message:
            case Step():
                await self._step(message)
            case LoadStage():
                return await self._load(message)
            case ConnectNext():
                return await self._connect_next(message)
            case GetCounters():
                return self._counters()
            case Down():
                self._on_down(message)
        return None

    async def _load(self, plan: LoadStage) -> StageReport:
        start_s = time.monotonic()
        self._model = model = await self._compute.run(lambda: self._loader(plan))
        self._plan = plan
        return StageReport(
            stage=plan.stage,
            layers=(plan.first_layer, plan.last_layer),
            num_params=model.num_params,
            param_bytes=model.param_bytes,
            load_s=time.monotonic() - start_s,
        )

    async def _connect_next(self, message: ConnectNext) -> Ready:
        plan = self._loaded_plan()
        if message.address is not None:
            self._next = await self.system.connect(message.address, actor=STAGE_ACTOR, timeout=CONNECT_TIMEOUT_S)
        return Ready(stage=plan.stage)

    async def _step(self, message: Step) -> None:
        plan = self._loaded_plan()
        if message.epoch != plan.epoch:
            log.debug("stage %d drops a step of epoch %d", plan.stage, message.epoch)
            return
        try:
            await self._compute_and_pass_on(message)
        except Broken:
            # The coordinator hears of a lost stage from its own link and process watch, and says which one it was.
            log.info("stage %d: the next stage is gone", plan.stage)
        except Exception as error:
            log.exception("stage %d failed in a step", plan.stage)
            failure = StageFailed(epoch=plan.epoch, stage=plan.stage, error=to_data(error))
            await self._coordinator.tell(failure, timeout=SEND_TIMEOUT_S)

    async def _compute_and_pass_on(self, message: Step) -> None:
        model = self._loaded_model()
        output = await self._compute.step(lambda: model.step(message))
        if self._next is None:
            tokens = Tokens(
                epoch=message.epoch,
                micro_batch=message.micro_batch,
                step=message.step,
                token_ids=output.token_ids,
            )
            await self._coordinator.tell(tokens, timeout=SEND_TIMEOUT_S)
        else:
            passed_on = Step(
                epoch=message.epoch,
                micro_batch=message.micro_batch,
                step=message.step,
                delta=message.delta,
                hidden=output.hidden,
            )
            await self._next.tell(passed_on, timeout=SEND_TIMEOUT_S)

    def _counters(self) -> StageCounters:
        counters = self._compute.counters()
        return StageCounters(
            stage=self._loaded_plan().stage,
            steps=counters.steps,
            busy_s=counters.busy_s,
            span_s=counters.span_s,
        )

    def _on_down(self, message: Down) -> None:
        if message.ref == self._coordinator and not self._lost.done():
            self._lost.set_result(None)

    def _loaded_plan(self) -> LoadStage:
        if self._plan is None:
            raise Invalid("this worker has no stage yet: LoadStage comes first")
        return self._plan

    def _loaded_model(self) -> StageCompute:
        if self._model is None:
            raise Invalid("this worker has no layers yet: LoadStage comes first")
        return self._model


def load_model(plan: LoadStage, *, device: str) -> StageCompute:
    """Load the plan's layers. Raises Invalid for a bad checkpoint."""
    import torch

    from asyncpipe_workers.stage_model import StageModel

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Invalid(f"--device {device}: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    if plan.num_threads:
        torch.set_num_threads(plan.num_threads)
    try:
        return StageModel.load(
            checkpoint=Path(plan.checkpoint),
            first_layer=plan.first_layer,
            last_layer=plan.last_layer,
            num_stages=plan.num_stages,
            stage=plan.stage,
            dtype=plan.dtype,
            max_context_len=plan.max_context_len,
            device=device,
        )
    except (AsyncPipeError, MemoryError):
        raise
    except OSError as error:
        raise Invalid(f"cannot read the checkpoint {plan.checkpoint}: {error}") from error
