"""The stage actor: takes steps in order, computes them on the compute thread, passes them on.

It decides nothing about requests. The coordinator says what to load and where the next stage listens; from then on a step
arrives, its delta is applied, its layers are computed, and hidden states go to the next stage or tokens to the coordinator.
Steps are queued on the compute thread as they arrive, and their results are sent as they come, so that receiving, computing and
sending overlap.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec

from asyncpipe.actors import Actor, ActorRef, Down
from asyncpipe.errors import AsyncPipeError, Broken, Invalid, to_data
from asyncpipe.wire.messages import (
    ClockReading,
    ConnectNext,
    GetClock,
    GetCounters,
    GetSpans,
    LoadStage,
    Message,
    Ready,
    StageFailed,
    StageReport,
    StageTiming,
    Step,
    Tokens,
    ToStage,
)
from asyncpipe_workers.executor import ComputeThread, Timed
from asyncpipe_workers.output import StageOutput
from asyncpipe_workers.recorder import StageRecorder

STAGE_ACTOR = "stage"
SEND_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
MAX_QUEUED_STEPS = 1024  # there are never more than micro-batches

log = logging.getLogger(__name__)


class StageCompute(Protocol):
    """What a stage drives: a model's layers, or anything that takes steps."""

    @property
    def num_params(self) -> int: ...

    @property
    def param_bytes(self) -> int: ...

    @property
    def kv_blocks(self) -> int: ...

    @property
    def kv_block_bytes(self) -> int: ...

    @property
    def link_s(self) -> float:
        """Simulated delay of a message on its way in, and of the last stage's on its way out; 0.0 for real stages."""
        ...

    def step(self, message: Step, *, arrived_at_s: float) -> StageOutput: ...


Loader = Callable[[LoadStage], StageCompute]


class _Queued(NamedTuple):
    """A step on the compute thread; `arrived_ns` is when it could have begun on an idle stage."""

    step: Step
    arrived_ns: int
    output: asyncio.Future[Timed[StageOutput]]


class StageActor(Actor):
    """One stage of the pipeline."""

    receives: ClassVar[Any] = ToStage
    mailbox_capacity: ClassVar[int] = 64

    def __init__(self, *, coordinator: ActorRef, loader: Loader, lost: asyncio.Future[None]) -> None:
        self._coordinator = coordinator
        self._loader = loader
        self._lost = lost  # completed when the coordinator is gone and this process has no more to do
        self._compute = ComputeThread()
        self._recorder = StageRecorder()
        self._queued: asyncio.Queue[_Queued] = asyncio.Queue(MAX_QUEUED_STEPS)
        self._plan: LoadStage | None = None
        self._model: StageCompute | None = None
        self._next: ActorRef | None = None

    async def started(self) -> None:
        self.system.monitor(self._coordinator, watcher=self.ref)
        self.background(self._pass_on_all(), name="pass on")

    async def stopped(self) -> None:
        self._compute.close()

    async def handle(self, message: Message | Down) -> Message | None:
        match message:
            case Step():
                await self._take(message)
            case LoadStage():
                return await self._load(message)
            case ConnectNext():
                return await self._connect_next(message)
            case GetCounters():
                return self._recorder.counters(self._loaded_plan().stage)
            case GetClock():
                return ClockReading(monotonic_ns=time.monotonic_ns())
            case GetSpans():
                return self._recorder.spans.since(message.first)
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
            kv_blocks=model.kv_blocks,
            kv_block_bytes=model.kv_block_bytes,
        )

    async def _connect_next(self, message: ConnectNext) -> Ready:
        plan = self._loaded_plan()
        if message.address is not None:
            self._next = await self.system.connect(message.address, actor=STAGE_ACTOR, timeout=CONNECT_TIMEOUT_S)
        return Ready(stage=plan.stage)

    # --- steps ---

    async def _take(self, step: Step) -> None:
        plan, model = self._loaded_plan(), self._loaded_model()
        if step.epoch != plan.epoch:
            log.debug("stage %d drops a step of epoch %d", plan.stage, step.epoch)
            return
        arrived_ns = time.monotonic_ns() + int(model.link_s * 1e9)
        output = self._compute.queue(lambda: model.step(step, arrived_at_s=arrived_ns / 1e9))
        await self._queued.put(_Queued(step, arrived_ns, output))

    async def _pass_on_all(self) -> None:
        while True:
            queued = await self._queued.get()
            try:
                await self._pass_on(queued)
            except Broken:
                # The coordinator hears of a lost stage from its own link and process watch, and says which one it was.
                log.info("stage %d: the next stage is gone", self._loaded_plan().stage)
            except Exception as error:
                await self._report(error)

    async def _pass_on(self, queued: _Queued) -> None:
        """Wait for a step's output and send it where it goes."""
        step, timed = queued.step, await queued.output
        start_ns, end_ns = timed.result.began_ns or timed.start_ns, timed.result.ended_ns or timed.end_ns
        self._recorder.computed(step, start_ns=start_ns, end_ns=end_ns)
        timing = StageTiming(max(start_ns - queued.arrived_ns, 0) // 1000, (end_ns - start_ns) // 1000)
        step = msgspec.structs.replace(step, timings=(*step.timings, timing), hidden=timed.result.hidden)
        if self._next is None and (link_s := self._loaded_model().link_s):
            await asyncio.sleep(link_s - (time.monotonic_ns() - end_ns) / 1e9)
        send_ns = time.monotonic_ns()
        if self._next is None:
            await self._coordinator.tell(_tokens(step, timed.result), timeout=SEND_TIMEOUT_S)
        else:
            await self._next.tell(step, timeout=SEND_TIMEOUT_S)
        self._recorder.sent(step, start_ns=send_ns, end_ns=time.monotonic_ns())

    async def _report(self, error: Exception) -> None:
        plan = self._loaded_plan()
        log.error("stage %d failed in a step", plan.stage, exc_info=error)
        failure = StageFailed(epoch=plan.epoch, stage=plan.stage, error=to_data(error))
        try:
            await self._coordinator.tell(failure, timeout=SEND_TIMEOUT_S)
        except AsyncPipeError as lost:
            log.info("stage %d cannot report its failure: %s", plan.stage, lost)

    # --- small things ---

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


def _tokens(step: Step, output: StageOutput) -> Tokens:
    return Tokens(
        epoch=step.epoch,
        micro_batch=step.micro_batch,
        step=step.step,
        token_ids=output.token_ids,
        timings=step.timings,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
    )
