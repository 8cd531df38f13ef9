"""The coordinator actor: turns messages into events for the machine, and the machine's commands into messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, assert_never

from asyncpipe.actors import Actor, ActorRef, Down
from asyncpipe.errors import AsyncPipeError, Invalid, Refused, StageLost, WireError, from_data, to_data
from asyncpipe.wire.messages import (
    Accepted,
    Cancel,
    Generate,
    Join,
    Message,
    StageFailed,
    Step,
    Tokens,
    Welcome,
    WorkerToCoordinator,
)
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.shell.clients import Clients
from asyncpipe_coordinator.shell.long_prompts import LongPrompts
from asyncpipe_coordinator.shell.outbox import SendFailed
from asyncpipe_coordinator.shell.pool import WorkerPool
from asyncpipe_coordinator.shell.requests import Requests
from asyncpipe_coordinator.shell.workers import Worker
from asyncpipe_coordinator.text import TextCodec

COORDINATOR_ACTOR = "coordinator"
TICK_S = 0.25


@dataclass(frozen=True, slots=True)
class PipelineUp:
    """Local: the stages of `epoch` are loaded and connected."""

    epoch: int


@dataclass(frozen=True, slots=True)
class PipelineGone:
    """Local: it does not help to bring it up again."""

    error: AsyncPipeError


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """Local: a worker that some stage has, or had, died."""

    worker: Worker
    error: AsyncPipeError


@dataclass(frozen=True, slots=True)
class Loss:
    """Why the pipeline does not go on, and the stages that need another worker."""

    stages: tuple[int, ...]
    error: AsyncPipeError


@dataclass(frozen=True, slots=True)
class Tick:
    """Local: time has passed."""


LocalMessage = PipelineUp | PipelineGone | WorkerLost | Tick | SendFailed | Down
AnyMessage = Generate | Cancel | WorkerToCoordinator | LocalMessage


class CoordinatorActor(Actor):
    """Owns the machine; everything it knows about the outside is in `_pool`, `_requests` and `_clients`."""

    receives: ClassVar[Any] = Generate | Cancel | WorkerToCoordinator
    mailbox_capacity: ClassVar[int] = 1024

    def __init__(
        self,
        *,
        machine: Machine,
        codec: TextCodec,
        model: ModelInfo,
        step_timeout_s: float,
        on_pipeline_lost: Callable[[Loss], None],
    ) -> None:
        self._machine = machine
        self._codec = codec
        self._model = model
        self._step_timeout_s = step_timeout_s
        self._on_pipeline_lost = on_pipeline_lost
        self._pool: WorkerPool | None = None
        self._is_up = False
        self._num_epochs = 0
        self._long_prompts = LongPrompts(
            codec,
            max_tokens=model.max_context_len - 1,
            max_waiting=machine.limits.max_waiting,
            accept=self._on_tokenized,
        )

    # --- for the service, on the same loop ---

    def use(self, pool: WorkerPool | None) -> None:
        """Whose workers join, and compute; None: it is to end, and that its workers leave is no loss."""
        if pool is None:
            self._is_up = False
            self._handle(events.PipelineLost())
        self._pool = pool

    @property
    def pool(self) -> WorkerPool | None:
        return self._pool

    @property
    def is_up(self) -> bool:
        return self._is_up

    @property
    def num_restarts(self) -> int:
        """Times that the pipeline was brought up again."""
        return max(self._num_epochs - 1, 0)

    # --- messages ---

    async def started(self) -> None:
        self._clients = Clients(self.system, owner=self.ref)
        self._requests = Requests(self._clients, codec=self._codec, model=self._model)

    async def stopped(self) -> None:
        self._long_prompts.close()

    async def handle(self, message: AnyMessage) -> Message | asyncio.Future[Accepted] | None:
        with self._updates():
            return self._dispatch(message)

    def _dispatch(self, message: AnyMessage) -> Message | asyncio.Future[Accepted] | None:
        match message:
            case Tokens():
                self._on_tokens(message)
            case Generate() if LongPrompts.is_one(message):
                return self.answer_later(self._long_prompts.tokenize(message, self._sender()), name="tokenize")
            case Generate():
                return self._on_generate(message, self._sender())
            case Cancel():
                self._long_prompts.cancel(message.request_id, self._sender())
                self._cancel(self._requests.of(self._sender(), request_id=message.request_id))
            case Join():
                return self._on_join(message)
            case StageFailed():
                self._on_stage_failed(message)
            case PipelineUp():
                self._on_pipeline_up(message.epoch)
            case PipelineGone():
                self._handle(events.PipelineGone(error=to_data(message.error)))
            case WorkerLost():
                self._on_worker_lost(message)
            case Tick():
                self._on_tick()
            case SendFailed():
                self._on_send_failed(message)
            case Down():
                self._on_down(message)
            case _:
                assert_never(message)
        return None

    def _on_tokenized(self, message: Generate, sender: ActorRef, is_cancelled: bool) -> Accepted:
        with self._updates():
            accepted = self._on_generate(message, sender)
            if is_cancelled:
                self._cancel(self._requests.of(sender, request_id=message.request_id))
            return accepted

    def _on_generate(self, message: Generate, sender: ActorRef) -> Accepted:
        accepted, submitted = self._requests.open(message, sender)
        for event in submitted:
            self._handle(event)
        return accepted

    def _on_tokens(self, tokens: Tokens) -> None:
        if not self._is_from(self._num_stages - 1):
            return
        try:
            self._handle(events.TokensArrived(tokens=tokens, at_s=time.monotonic()))
        except WireError as error:
            self._lose_pipeline([self._num_stages - 1], StageLost(f"the last stage broke the protocol: {error}"))

    def _on_join(self, message: Join) -> Welcome:
        if self._pool is None:
            raise Invalid("no workers are expected now")
        sender = self._sender()
        if sender.role != "worker":
            raise Refused(f"a {sender.role} cannot join as a worker")
        self._pool.source.on_join(message, sender)
        self.system.monitor(sender, watcher=self.ref)
        return Welcome(epoch=self._pool.epoch)

    def _on_pipeline_up(self, epoch: int) -> None:
        """Somebody may have been lost since: `pool.lose` has taken note, and there is no epoch to begin."""
        assert self._pool is not None  # noqa: S101 - it has been brought up
        self._is_up = True
        self._num_epochs += 1
        if missing := [stage for stage in range(self._num_stages) if stage not in self._pool.workers]:
            self._lose_pipeline(missing, StageLost(f"stage {missing[0]} was lost while the pipeline was brought up"))
            return
        ready = events.PipelineReady(
            epoch=epoch,
            kv_blocks=self._pool.kv_blocks,
            is_ring=self._pool.is_ring,
            shares_memory=self._pool.shares_memory,
            at_s=time.monotonic(),
        )
        self._handle(ready)

    def _on_tick(self) -> None:
        now_s = time.monotonic()
        self._handle(events.Tick(at_s=now_s))
        late = self._machine.step_awaited_since(now_s - self._step_timeout_s)
        if late is not None:
            what = f"no tokens came back for micro-batch {late.micro_batch}, step {late.step}"
            error = StageLost(f"{what}, within {self._step_timeout_s:g} s")
            self._lose_pipeline(range(self._num_stages), error)  # nobody knows where it got stuck

    # --- losses ---

    def _on_stage_failed(self, message: StageFailed) -> None:
        reporter = self._pool.stage_of(self._sender()) if self._pool is not None else None
        if reporter is None or self._pool is None or message.epoch != self._pool.epoch:
            return
        if message.stage in {(reporter + way) % self._num_stages for way in (-1, 0, 1)}:
            self._lose_stage(message.stage, from_data(message.error))

    def _on_worker_lost(self, message: WorkerLost) -> None:
        """Its link's end may have said so before, less clearly."""
        stage = self._pool.stage_of(message.worker.ref) if self._pool is not None else None
        if stage is not None:
            self._lose_stage(stage, message.error)

    def _on_send_failed(self, message: SendFailed) -> None:
        if self._pool is not None and self._pool.stage_of(message.target) == 0:
            self._lose_stage(0, message.error)
        else:
            self._drop_client(message.target)

    def _on_down(self, message: Down) -> None:
        error = from_data(message.error)
        stage = self._pool.stage_of(message.ref) if self._pool is not None else None
        if stage is not None:
            self._lose_stage(stage, error)
        elif message.ref in self._clients:
            self._drop_client(message.ref)
        elif self._pool is not None:
            self._pool.source.on_down(message.ref, error)

    def _lose_stage(self, stage: int, error: AsyncPipeError) -> None:
        assert self._pool is not None  # noqa: S101 - the callers have looked
        lost = self._pool.lost(stage, error)
        self._pool.lose([stage], error)
        self._lose_pipeline([stage], lost)

    def _lose_pipeline(self, stages: Iterable[int], error: AsyncPipeError) -> None:
        """Once per epoch: requests wait, and the service brings the pipeline up again."""
        if not self._is_up or self._pool is None:
            return
        self._is_up = False
        self._handle(events.PipelineLost())
        self._on_pipeline_lost(Loss(tuple(stages), error))

    # --- clients ---

    def _drop_client(self, ref: ActorRef) -> None:
        """Gone, or too slow: its requests end, nobody else's do."""
        client = self._clients.pop(ref)
        if client is None:
            return
        self.background(self.system.stop(client.outbox_ref), name="stop outbox")
        self._cancel(self._requests.of(ref))

    @contextmanager
    def _updates(self) -> Iterator[None]:
        """One message to each client for all that happens to its requests meanwhile."""
        try:
            yield
        finally:
            self._clients.send_updates(self._on_client_failed)

    def _on_client_failed(self, client: ActorRef, error: AsyncPipeError) -> None:
        self.ref.signal(SendFailed(client, error))

    # --- commands ---

    def _handle(self, event: events.Event) -> None:
        done = self._machine.handle(event)
        ending = {c.request_id: c.num_completion_tokens for c in done if isinstance(c, commands.FinishRequest)}
        for command in done:
            match command:
                case commands.EmitToken():
                    self._emit(command, is_last=ending.get(command.request_id) == command.index + 1)
                case commands.IssueStep():
                    self._issue(command.step)
                case commands.EmitPromptLogprobs():
                    self._requests.score(command)
                case commands.FinishRequest():
                    self._requests.finish(command)
                case commands.FailRequest():
                    self._cancel(self._requests.fail(command))
                case _:
                    assert_never(command)

    def _issue(self, step: Step) -> None:
        assert self._pool is not None  # noqa: S101 - the machine issues only between PipelineReady and PipelineLost
        first = self._pool.first
        try:
            # There are more credits than micro-batches, so this is never Busy.
            first.tell_nowait(step)
        except AsyncPipeError as error:
            self.ref.signal(SendFailed(first, error))

    def _emit(self, command: commands.EmitToken, *, is_last: bool) -> None:
        if self._requests.emit(command, is_last=is_last):
            self._handle(events.StopStringFound(request_id=command.request_id, at_s=time.monotonic()))

    def _cancel(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._handle(events.Cancelled(request_id=request_id, at_s=time.monotonic()))

    # --- small things ---

    @property
    def _num_stages(self) -> int:
        return self._machine.limits.num_stages

    def _is_from(self, stage: int) -> bool:
        """Whether the message at hand is from the worker of `stage`: others have no say, whatever they send."""
        worker = self._pool.workers.get(stage) if self._pool is not None else None
        return worker is not None and worker.ref == self.sender

    def _sender(self) -> ActorRef:
        if self.sender is None:
            raise Invalid("this message needs a sender to answer to")
        return self.sender
