"""The stage actor: takes steps in order, computes them on the compute thread, passes them on.

It decides nothing about requests. The coordinator says what to load and where the next stage listens; from then on a step
arrives, its delta is applied, its layers are computed, and hidden states go to the next stage or tokens to the coordinator.
Stages form a ring: of several steps at once the last stage gives the first one the next, with the tokens that it has chosen.
Steps are queued on the compute thread as they arrive, and their results are sent as they come, so that receiving, computing and
sending overlap.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import msgspec

from asyncpipe.actors import Actor, ActorRef, Down
from asyncpipe.errors import AsyncPipeError, Broken, Busy, Closed, Invalid, StageLost, from_data, to_data
from asyncpipe.wire.messages import (
    ClockReading,
    ConnectNext,
    Delta,
    GetClock,
    GetCounters,
    GetSpans,
    HostLink,
    LoadStage,
    Message,
    Ready,
    StageFailed,
    StageReport,
    StageTiming,
    Step,
    ToStage,
)
from asyncpipe_workers.executor import ComputeThread, Timed
from asyncpipe_workers.gathering import Gathering
from asyncpipe_workers.hidden_links import HiddenLinks, StageSeat
from asyncpipe_workers.outgoing import Outgoing, Sender
from asyncpipe_workers.output import ArrivedStep, StageOutput
from asyncpipe_workers.recorder import StageRecorder
from asyncpipe_workers.stage_compute import Loader, StageCompute

if TYPE_CHECKING:
    import torch

STAGE_ACTOR = "stage"
CONNECT_TIMEOUT_S = 5.0
MAX_QUEUED_STEPS = 1024  # there are never more than micro-batches

log = logging.getLogger(__name__)


class _Awaited(NamedTuple):
    """A step that is here, and whose hidden states may still be on their way."""

    step: Step
    hidden: asyncio.Future[torch.Tensor] | None


class _Computed(NamedTuple):
    arrived: ArrivedStep
    output: StageOutput


class StageActor(Actor):
    """One stage of the pipeline."""

    receives: ClassVar[Any] = ToStage
    mailbox_capacity: ClassVar[int] = 64

    def __init__(self, *, loader: Loader, seat: StageSeat, admit: Callable[[str], None] = lambda _: None) -> None:
        """`admit` hears the public key of the stage before, which is about to connect; empty: it has none."""
        self._loader = loader
        self._seat = seat
        self._admit = admit
        self._links = HiddenLinks(seat, background=lambda work, name: self.background(work, name=name))
        self._awaited: deque[_Awaited] = deque()
        self._lost: asyncio.Future[AsyncPipeError] | None = None  # completed when the coordinator is gone
        self._compute = ComputeThread()
        self._epoch: int | None = None  # whose steps are computed; the compute thread looks at it too
        self._recorder = StageRecorder()
        self._arrived: deque[ArrivedStep] = deque()  # that the compute thread has not begun
        self._gathering = Gathering()
        self._num_queued = 0  # steps that were taken and have not left
        self._coordinator = Sender("the coordinator", recorder=self._recorder, on_unreachable=self._on_unreachable)
        self._next = Sender("the next stage", recorder=self._recorder, on_unreachable=self._on_unreachable)
        self._plan: LoadStage | None = None
        self._model: StageCompute | None = None

    def serve(self, coordinator: ActorRef) -> asyncio.Future[AsyncPipeError]:
        """For the process that runs this actor, and watches `coordinator`, as seen by it: whom it serves. The future says
        how that coordinator was lost."""
        self._coordinator.target = coordinator
        self._lost = asyncio.get_running_loop().create_future()
        return self._lost

    @property
    def stage(self) -> int | None:
        """Which one it holds."""
        return None if self._plan is None else self._plan.stage

    async def started(self) -> None:
        self.background(self._coordinator.send_waiting(), name="send tokens")
        self.background(self._next.send_waiting(), name="send steps")

    async def stopped(self) -> None:
        await self._links.stop()
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
            case HostLink():
                return await self._links.host(message, device=self._device)
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
        """What is of an epoch before is dropped from now on; a model that is the plan's already stays."""
        start_s = time.monotonic()
        self._begin(plan.epoch)
        self._next.target = None
        self._admit(plan.previous_key)
        self._links.close()
        self._awaited.clear()
        if self._model is not None and self._plan is not None and _holds_the_same(self._plan, plan):
            log.info("stage %d keeps what it holds", plan.stage)
            self._model.posts_hidden = False
            await self._compute.run(self._model.forget_all)
        else:
            await self._compute.run(self._unload)
            self._model = await self._compute.run(lambda: self._loader(plan))
            gc.freeze()  # what is here now stays: no collection need look at it again
        self._plan, self._num_queued, model = plan, 0, self._model
        self._recorder.transfers = model.transfers
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

    def _begin(self, epoch: int | None) -> None:
        self._epoch = epoch
        self._gathering.clear()
        self._coordinator.begin(epoch)
        self._next.begin(epoch)

    def _unload(self) -> None:
        """On the compute thread: so that there is room for another model."""
        if self._model is not None:
            model, self._model, self._plan = self._model, None, None
            model.close()
            gc.unfreeze()
            gc.collect()

    async def _connect_next(self, message: ConnectNext) -> Ready:
        plan = self._loaded_plan()
        if message.address is None:
            return Ready(stage=plan.stage)
        try:
            following = await self.system.connect(
                message.address, actor=STAGE_ACTOR, timeout=CONNECT_TIMEOUT_S, server_key=message.public_key or None
            )
        except AsyncPipeError as error:
            if self._is_last:  # the coordinator can do without
                return Ready(stage=plan.stage, obstacle=str(error))
            raise StageLost(f"stage {plan.stage} cannot reach it: {error}") from None
        self._next.target = following
        self.system.monitor(following, watcher=self.ref)
        if self._is_last:
            return Ready(stage=plan.stage)
        chosen = await self._links.connect(following, wanted=message.link, epoch=plan.epoch, device=self._device)
        self._loaded_model().posts_hidden = self._links.sends
        return Ready(stage=plan.stage, link=chosen.link, obstacle=chosen.obstacle)

    @property
    def _device(self) -> str:
        return self._loaded_plan().device or self._seat.device

    # --- steps ---

    def _take(self, step: Step) -> None:
        plan, model = self._loaded_plan(), self._loaded_model()
        if step.epoch != plan.epoch:
            log.debug("stage %d drops a step of epoch %d", plan.stage, step.epoch)
            return
        if self._num_queued >= MAX_QUEUED_STEPS:
            raise Busy(f"stage {plan.stage} has {MAX_QUEUED_STEPS} steps queued already")
        self._num_queued += 1
        if step.posted is None and not self._awaited:
            self._queue(step, None, model)
            return
        hidden = None if step.posted is None else self._links.recv(step.posted)
        self._awaited.append(_Awaited(step, hidden))
        if hidden is not None:
            hidden.add_done_callback(lambda _: self._queue_awaited())

    def _queue_awaited(self) -> None:
        """As far as everything is there, in the order of the steps."""
        while self._awaited and ((hidden := self._awaited[0].hidden) is None or hidden.done()):
            step = self._awaited.popleft().step
            if hidden is not None and hidden.cancelled():
                return  # of an epoch that is over
            if hidden is not None and (error := hidden.exception()) is not None:
                self._signal_failure(self._loaded_plan().stage - 1, Broken(f"its hidden states do not arrive: {error}"))
                return
            self._queue(step, None if hidden is None else hidden.result(), self._loaded_model())

    def _queue(self, step: Step, hidden: torch.Tensor | None, model: StageCompute) -> None:
        self._arrived.append(ArrivedStep(step, time.monotonic_ns() + int(model.link_s * 1e9), hidden))
        self._compute.queue(self._compute_arrived, functools.partial(self._on_computed, epoch=step.epoch))

    def _compute_arrived(self) -> Iterator[_Computed]:
        """On the compute thread, once for each step that has arrived: it finds nothing when its step went with others."""
        while self._arrived and self._arrived[0].step.epoch != self._epoch:
            self._arrived.popleft()
        if not self._arrived:
            return
        model = self._loaded_model()
        steps = [self._arrived.popleft() for _ in range(model.choose(lambda: list(self._arrived)))]
        model.use_threads(self._num_threads(steps))
        for step, output in zip(steps, model.compute(steps), strict=True):
            yield _Computed(step, output)

    def _num_threads(self, steps: Sequence[ArrivedStep]) -> int:
        """The other stages of this machine do not need theirs while they rest."""
        plan = self._loaded_plan()
        return max(plan.num_threads, plan.machine_threads) if all(each.step.is_alone for each in steps) else plan.num_threads

    def _on_computed(self, timed: Timed[_Computed], *, epoch: int) -> None:
        """On the event loop, in the order of the steps."""
        if epoch != self._epoch:
            return
        self._num_queued -= 1
        try:
            (step, arrived_ns, _), output = timed.unwrap()
        except Exception as error:
            self._report(error)
            return
        start_ns, end_ns = output.began_ns or timed.start_ns, output.ended_ns or timed.end_ns
        timing = StageTiming(max(start_ns - arrived_ns, 0) // 1000, (end_ns - start_ns) // 1000)
        timings = (*step.timings, timing)
        if self._is_last:
            self._answer(step, timings, output, end_ns)
        else:
            self._pass_on(step, timings, output)
        num_steps = step.delta.num_steps if self._is_whole_pipeline else 1
        self._recorder.computed(step, start_ns=start_ns, end_ns=end_ns, num_steps=num_steps)

    def _pass_on(self, step: Step, timings: tuple[StageTiming, ...], output: StageOutput) -> None:
        posted = None if output.posted is None else self._links.send(output.posted, self._on_link_failed)
        message = msgspec.structs.replace(step, timings=timings, hidden=output.hidden, posted=posted)
        self._next.send(Outgoing(step, message))

    def _answer(self, step: Step, timings: tuple[StageTiming, ...], output: StageOutput, end_ns: int) -> None:
        """The stages first: they work on the next of several steps while the coordinator gets the tokens of this one."""
        if step.delta.num_steps > 1 and not self._is_whole_pipeline:
            self._next.send(Outgoing(step, _following(step, output)))
        if (tokens := self._gathering.add(step, timings, output)) is not None:
            due_ns = end_ns + int(self._loaded_model().link_s * 1e9)
            self._coordinator.send(Outgoing(step, tokens, due_ns))

    @property
    def _is_whole_pipeline(self) -> bool:
        return self._loaded_plan().num_stages == 1

    @property
    def _is_last(self) -> bool:
        plan = self._loaded_plan()
        return plan.stage == plan.num_stages - 1

    def _on_link_failed(self, error: AsyncPipeError) -> None:
        if not isinstance(error, Closed):  # by us, for another epoch
            self._signal_failure(self._loaded_plan().stage + 1, Broken(f"its hidden states cannot be sent: {error}"))

    def _on_unreachable(self, error: AsyncPipeError) -> None:
        """That it is gone its watch says (`_on_down`); a slow one the coordinator hears of from us."""
        stage = self._loaded_plan().stage
        if isinstance(error, Broken | Closed):
            log.info("stage %d cannot send: %s", stage, error)
        else:
            self._report(error)

    def _report(self, error: Exception) -> None:
        stage = self._loaded_plan().stage
        log.error("stage %d failed in a step", stage, exc_info=error)
        self._signal_failure(stage, error)

    def _signal_failure(self, stage: int, error: Exception) -> None:
        plan = self._loaded_plan()
        try:
            if self._coordinator.target is not None:
                self._coordinator.target.signal(StageFailed(epoch=plan.epoch, stage=stage, error=to_data(error)))
        except AsyncPipeError as lost:
            log.info("stage %d cannot report a failure: %s", plan.stage, lost)

    # --- small things ---

    def _on_down(self, message: Down) -> None:
        error = from_data(message.error)
        if message.ref == self._coordinator.target:
            self._begin(None)  # what it had asked for is of no use to anybody
            if self._lost is not None and not self._lost.done():
                self._lost.set_result(error)
        elif message.ref == self._next.target:
            self._next.target = None
            plan = self._loaded_plan()
            self._signal_failure((plan.stage + 1) % plan.num_stages, Broken(f"stage {plan.stage} cannot reach it: {error}"))

    def _loaded_plan(self) -> LoadStage:
        if self._plan is None:
            raise Invalid("this worker has no stage yet: LoadStage comes first")
        return self._plan

    def _loaded_model(self) -> StageCompute:
        if self._model is None:
            raise Invalid("this worker has no layers yet: LoadStage comes first")
        return self._model


def _following(step: Step, output: StageOutput) -> Step:
    """The next of several steps at once, for the first stage: every member goes on with what was chosen for it."""
    delta = Delta(token_ids=output.token_ids, num_steps=step.delta.num_steps - 1)
    return Step(
        epoch=step.epoch,
        micro_batch=step.micro_batch,
        step=step.step + 1,
        delta=delta,
        is_alone=step.is_alone,
        is_gathered=step.is_gathered,
    )


def _holds_the_same(held: LoadStage, wanted: LoadStage) -> bool:
    """Whether who holds what `held` says has what `wanted` asks for: they differ at most in when, and among whom."""
    names = ("epoch", "previous_key", "num_threads", "machine_threads", "kv_share")
    circumstances = {name: getattr(wanted, name) for name in names}
    return msgspec.structs.replace(held, **circumstances) == wanted
