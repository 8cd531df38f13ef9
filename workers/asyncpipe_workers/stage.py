"""The stage actor: takes steps in order, computes them on the compute thread, passes them on.

It decides nothing about requests. The coordinator says what to load and where the next stage listens; from then on a step
arrives, its delta is applied, its layers are computed, and hidden states go to the next stage or tokens to the coordinator.
Steps are queued on the compute thread as they arrive, and their results are sent as they come, so that receiving, computing and
sending overlap.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec

from asyncpipe.actors import Actor, ActorRef, Down
from asyncpipe.errors import AsyncPipeError, Broken, Busy, Closed, Invalid, to_data
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
    TierReport,
    Tokens,
    ToStage,
)
from asyncpipe_workers.executor import ComputeThread, Timed
from asyncpipe_workers.memory.transfers import TransferLog
from asyncpipe_workers.output import ArrivedStep, StageOutput
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

    @property
    def tiers(self) -> TierReport:
        """Where its bytes live."""
        ...

    @property
    def transfers(self) -> TransferLog | None:
        """What moves between memory tiers, if anything can."""
        ...

    def choose(self, arrived: Callable[[], Sequence[ArrivedStep]]) -> int:
        """How many of the steps that have arrived by now are to be computed together: the first so many, at least one."""
        ...

    def compute(self, steps: Sequence[ArrivedStep]) -> Iterable[StageOutput]:
        """One output for each step, in order, each as soon as it is there."""
        ...

    def close(self) -> None: ...


Loader = Callable[[LoadStage], StageCompute]


class _Outgoing(NamedTuple):
    """A computed step on its way out, not before `due_ns`."""

    step: Step
    message: Step | Tokens
    due_ns: int


class _Computed(NamedTuple):
    arrived: ArrivedStep
    output: StageOutput


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
        self._arrived: deque[ArrivedStep] = deque()  # that the compute thread has not begun
        self._num_queued = 0  # steps that were taken and have not left
        self._outgoing: asyncio.Queue[_Outgoing] = asyncio.Queue(MAX_QUEUED_STEPS)  # that could not leave at once
        self._plan: LoadStage | None = None
        self._model: StageCompute | None = None
        self._next: ActorRef | None = None
        self._is_sending = False

    async def started(self) -> None:
        self.system.monitor(self._coordinator, watcher=self.ref)
        self.background(self._send_all(), name="send")

    async def stopped(self) -> None:
        self._compute.close()
        if self._model is not None:
            self._model.close()

    async def handle(self, message: Message | Down) -> Message | None:
        match message:
            case Step():
                self._take(message)
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
        self._recorder.transfers = model.transfers
        gc.freeze()  # what is here now stays: no collection need look at it again
        return StageReport(
            stage=plan.stage,
            layers=(plan.first_layer, plan.last_layer),
            num_params=model.num_params,
            param_bytes=model.param_bytes,
            load_s=time.monotonic() - start_s,
            kv_blocks=model.kv_blocks,
            kv_block_bytes=model.kv_block_bytes,
            tiers=model.tiers,
        )

    async def _connect_next(self, message: ConnectNext) -> Ready:
        plan = self._loaded_plan()
        if message.address is not None:
            self._next = await self.system.connect(message.address, actor=STAGE_ACTOR, timeout=CONNECT_TIMEOUT_S)
        return Ready(stage=plan.stage)

    # --- steps ---

    def _take(self, step: Step) -> None:
        plan, model = self._loaded_plan(), self._loaded_model()
        if step.epoch != plan.epoch:
            log.debug("stage %d drops a step of epoch %d", plan.stage, step.epoch)
            return
        if self._num_queued >= MAX_QUEUED_STEPS:
            raise Busy(f"stage {plan.stage} has {MAX_QUEUED_STEPS} steps queued already")
        self._num_queued += 1
        self._arrived.append(ArrivedStep(step, time.monotonic_ns() + int(model.link_s * 1e9)))
        self._compute.queue(self._compute_arrived, self._on_computed)

    def _compute_arrived(self) -> Iterator[_Computed]:
        """On the compute thread, once for each step that has arrived: it finds nothing when its step went with others."""
        if not self._arrived:
            return
        model = self._loaded_model()
        steps = [self._arrived.popleft() for _ in range(model.choose(lambda: list(self._arrived)))]
        for step, output in zip(steps, model.compute(steps), strict=True):
            yield _Computed(step, output)

    def _on_computed(self, timed: Timed[_Computed]) -> None:
        """On the event loop, in the order of the steps."""
        self._num_queued -= 1
        try:
            (step, arrived_ns), output = timed.unwrap()
        except Exception as error:
            self._report(error)
            return
        start_ns, end_ns = output.began_ns or timed.start_ns, output.ended_ns or timed.end_ns
        self._recorder.computed(step, start_ns=start_ns, end_ns=end_ns)
        timing = StageTiming(max(start_ns - arrived_ns, 0) // 1000, (end_ns - start_ns) // 1000)
        message = self._message(step, (*step.timings, timing), output)
        self._send(_Outgoing(step, message, end_ns + self._delay_ns))

    def _message(self, step: Step, timings: tuple[StageTiming, ...], output: StageOutput) -> Step | Tokens:
        """For the next stage, or from the last one for the coordinator."""
        if self._next is not None:
            return msgspec.structs.replace(step, timings=timings, hidden=output.hidden)
        return Tokens(
            epoch=step.epoch,
            micro_batch=step.micro_batch,
            step=step.step,
            token_ids=output.token_ids,
            timings=timings,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
        )

    @property
    def _delay_ns(self) -> int:
        """Simulated, of the link from the last stage to the coordinator."""
        return 0 if self._next is not None else int(self._loaded_model().link_s * 1e9)

    def _send(self, outgoing: _Outgoing) -> None:
        """At once when it can leave at once, else behind those that wait."""
        start_ns = time.monotonic_ns()
        if self._outgoing.empty() and not self._is_sending and outgoing.due_ns <= start_ns:
            try:
                self._target.tell_nowait(outgoing.message)
            except Busy:
                pass
            except AsyncPipeError as error:
                self._on_unreachable(error)
                return
            else:
                self._recorder.sent(outgoing.step, start_ns=start_ns, end_ns=time.monotonic_ns())
                return
        self._outgoing.put_nowait(outgoing)

    async def _send_all(self) -> None:
        """Those that have to wait, for credits or for their time."""
        while True:
            self._is_sending = False
            outgoing = await self._outgoing.get()
            self._is_sending = True
            if (early_ns := outgoing.due_ns - time.monotonic_ns()) > 0:
                await asyncio.sleep(early_ns / 1e9)
            start_ns = time.monotonic_ns()
            try:
                await self._target.tell(outgoing.message, timeout=SEND_TIMEOUT_S)
            except AsyncPipeError as error:
                self._on_unreachable(error)
            self._recorder.sent(outgoing.step, start_ns=start_ns, end_ns=time.monotonic_ns())

    @property
    def _target(self) -> ActorRef:
        return self._coordinator if self._next is None else self._next

    def _on_unreachable(self, error: AsyncPipeError) -> None:
        """The coordinator hears of a lost stage from its own link and process watch too; a slow one it hears of from us."""
        stage = self._loaded_plan().stage
        if isinstance(error, Broken | Closed):
            log.info("stage %d: the next stage is gone: %s", stage, error)
        else:
            self._report(error)

    def _report(self, error: Exception) -> None:
        plan = self._loaded_plan()
        log.error("stage %d failed in a step", plan.stage, exc_info=error)
        try:
            self._coordinator.signal(StageFailed(epoch=plan.epoch, stage=plan.stage, error=to_data(error)))
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
