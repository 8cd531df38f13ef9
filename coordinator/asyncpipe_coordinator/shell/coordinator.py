"""The coordinator actor: turns messages into events for the machine, and the machine's commands into messages."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, assert_never

import msgspec

from asyncpipe.actors import Actor, ActorRef, Down
from asyncpipe.errors import AsyncPipeError, Invalid, Refused, StageLost, WireError, from_data, to_data
from asyncpipe.wire.messages import (
    Accepted,
    Cancel,
    Failed,
    Finished,
    Generate,
    Join,
    Message,
    PromptScored,
    StageFailed,
    Step,
    Tokens,
    Usage,
    Welcome,
    WorkerToCoordinator,
)
from asyncpipe.wire.sampling import MAX_CHOICES, FinishReason
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.shell.clients import Clients
from asyncpipe_coordinator.shell.long_prompts import LongPrompts
from asyncpipe_coordinator.shell.outbox import SendFailed
from asyncpipe_coordinator.shell.pool import WorkerPool
from asyncpipe_coordinator.shell.requests import OpenChoice, check_prompt
from asyncpipe_coordinator.shell.workers import Worker
from asyncpipe_coordinator.text import TextCodec

COORDINATOR_ACTOR = "coordinator"
TICK_S = 0.25
SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbouring choices get unrelated seeds


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


@dataclass(frozen=True, slots=True)
class InFlight:
    step: Step
    issued_at_s: float


LocalMessage = PipelineUp | PipelineGone | WorkerLost | Tick | SendFailed | Down
AnyMessage = Generate | Cancel | WorkerToCoordinator | LocalMessage


class CoordinatorActor(Actor):
    """Owns the machine; everything it knows about the outside is in `_pool`, `_open` and `_clients`."""

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
        self._in_flight: dict[int, InFlight] = {}  # by micro-batch
        self._open: dict[str, OpenChoice] = {}  # by the machine's request id
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
            self._in_flight.clear()
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

    async def stopped(self) -> None:
        self._long_prompts.close()

    async def handle(self, message: AnyMessage) -> Message | asyncio.Future[Accepted] | None:
        try:
            return self._dispatch(message)
        finally:
            self._clients.send_updates(self._on_client_failed)

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
                self._on_cancel(message.request_id, self._sender())
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
        try:
            accepted = self._on_generate(message, sender)
            if is_cancelled:
                self._on_cancel(message.request_id, sender)
            return accepted
        finally:
            self._clients.send_updates(self._on_client_failed)

    def _on_generate(self, message: Generate, sender: ActorRef) -> Accepted:
        token_ids = self._prompt_tokens(message)
        key = self._unique(message.request_id, sender)
        client = self._clients.get(sender)
        sampling, now_s = message.sampling, time.monotonic()
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        if message.generated_token_ids and sampling.n > 1:
            raise Invalid(f"a request of {sampling.n} texts cannot go on after the tokens of one")
        for choice in range(sampling.n):
            self._open[_choice_id(key, choice)] = OpenChoice.create(
                message.request_id,
                choice,
                client=client,
                codec=self._codec,
                sampling=sampling,
                generated_token_ids=message.generated_token_ids,
            )
        for choice in range(sampling.n):
            self._handle(
                events.Submitted(
                    request_id=_choice_id(key, choice),
                    client=client.ref,
                    prompt_token_ids=token_ids,
                    sampling=sampling if choice == 0 else msgspec.structs.replace(sampling, prompt_logprobs=None),
                    seed=(seed + choice * SEED_STEP) % 2**63,
                    priority=message.priority,
                    deadline_at_s=None if message.deadline_s is None else now_s + message.deadline_s,
                    at_s=now_s,
                    generated_token_ids=message.generated_token_ids,
                )
            )
        return Accepted(request_id=message.request_id, prompt_token_ids=token_ids, seed=seed)

    def _prompt_tokens(self, message: Generate) -> tuple[int, ...]:
        if (message.prompt is None) == (message.prompt_token_ids is None):
            raise Invalid("give either prompt or prompt_token_ids")
        token_ids = message.prompt_token_ids
        if token_ids is None:
            token_ids = self._codec.encode(message.prompt or "")
        check_prompt(token_ids, self._model)
        return token_ids

    def _on_tokens(self, tokens: Tokens) -> None:
        if not self._is_from(self._num_stages - 1):
            return
        sent = self._in_flight.get(tokens.micro_batch)
        if sent is not None and sent.step.epoch == tokens.epoch and sent.step.step == tokens.step:
            del self._in_flight[tokens.micro_batch]
        try:
            self._handle(events.TokensArrived(tokens=tokens, at_s=time.monotonic()))
        except WireError as error:
            self._lose_pipeline([self._num_stages - 1], StageLost(f"the last stage broke the protocol: {error}"))

    def _on_cancel(self, client_request_id: str, client: ActorRef) -> None:
        for request_id, open_choice in list(self._open.items()):
            if open_choice.client.ref == client and open_choice.request_id == client_request_id:
                self._handle(events.Cancelled(request_id=request_id, at_s=time.monotonic()))

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
        self._handle(events.PipelineReady(epoch=epoch, kv_blocks=self._pool.kv_blocks, at_s=time.monotonic()))

    def _on_tick(self) -> None:
        now_s = time.monotonic()
        self._handle(events.Tick(at_s=now_s))
        for sent in self._in_flight.values():
            if now_s - sent.issued_at_s > self._step_timeout_s:
                self._lose_pipeline(
                    range(self._num_stages),  # nobody knows where it got stuck
                    StageLost(
                        f"no tokens came back for micro-batch {sent.step.micro_batch}, step {sent.step.step},"
                        f" within {self._step_timeout_s:g} s"
                    ),
                )
                return

    # --- losses ---

    def _on_stage_failed(self, message: StageFailed) -> None:
        reporter = self._pool.stage_of(self._sender()) if self._pool is not None else None
        if reporter is None or self._pool is None or message.epoch != self._pool.epoch:
            return
        if abs(message.stage - reporter) <= 1 and message.stage < self._num_stages:
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
        self._in_flight.clear()
        self._handle(events.PipelineLost())
        self._on_pipeline_lost(Loss(tuple(stages), error))

    # --- clients ---

    def _drop_client(self, ref: ActorRef) -> None:
        """Gone, or too slow: its requests end, nobody else's do."""
        client = self._clients.pop(ref)
        if client is None:
            return
        self.background(self.system.stop(client.outbox_ref), name="stop outbox")
        for request_id in [r for r, request in self._open.items() if request.client is client]:
            self._handle(events.Cancelled(request_id=request_id, at_s=time.monotonic()))

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
                    self._score(command)
                case commands.FinishRequest():
                    self._finish(command)
                case commands.FailRequest():
                    self._fail(command)
                case _:
                    assert_never(command)

    def _issue(self, step: Step) -> None:
        assert self._pool is not None  # noqa: S101 - the machine issues only between PipelineReady and PipelineLost
        first = self._pool.first
        self._in_flight[step.micro_batch] = InFlight(step, time.monotonic())
        try:
            # There are more credits than micro-batches, so this is never Busy.
            first.tell_nowait(step)
        except AsyncPipeError as error:
            self.ref.signal(SendFailed(first, error))

    def _emit(self, command: commands.EmitToken, *, is_last: bool) -> None:
        request = self._open.get(command.request_id)
        if request is None or request.num_to_stop is not None:
            return
        self._clients.update(request.client, request.piece(command, is_last=is_last))
        if request.stops.found:
            request.num_to_stop = command.index + 1
            self._handle(events.StopStringFound(request_id=command.request_id, at_s=time.monotonic()))

    def _score(self, command: commands.EmitPromptLogprobs) -> None:
        request = self._open.get(command.request_id)
        if request is not None:
            self._clients.update(request.client, PromptScored(request_id=request.request_id, logprobs=command.logprobs))

    def _finish(self, command: commands.FinishRequest) -> None:
        request = self._open.pop(command.request_id, None)
        if request is None:
            return
        reason, num_tokens = command.finish_reason, command.num_completion_tokens
        if request.num_to_stop is not None:  # of several steps at once: more was computed, perhaps to another end
            reason, num_tokens = FinishReason.STOP, request.num_to_stop
        usage = Usage(
            prompt_tokens=command.num_prompt_tokens,
            completion_tokens=num_tokens,
            time_to_first_token_s=command.time_to_first_token_s,
            total_s=command.total_s,
        )
        finished = Finished(
            request_id=request.request_id,
            finish_reason=reason,
            text=request.rest(),
            usage=usage,
            choice=request.choice,
        )
        self._clients.update(request.client, finished)

    def _fail(self, command: commands.FailRequest) -> None:
        """One choice that fails takes the others of its request with it."""
        request = self._open.pop(command.request_id, None)
        if request is None:
            return
        self._clients.update(request.client, Failed(request_id=request.request_id, error=command.error))
        self._on_cancel(request.request_id, request.client.ref)

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

    def _unique(self, request_id: str, sender: ActorRef) -> str:
        """Two clients may choose the same id; one client may not use it twice at once."""
        key = f"{sender.node}/{request_id}"
        if any(_choice_id(key, choice) in self._open for choice in range(MAX_CHOICES)):
            raise Invalid(f"request id {request_id!r} is in use; ids must be unique")
        return key


def _choice_id(key: str, choice: int) -> str:
    """The machine's id of one choice of a request."""
    return f"{key}#{choice}"
