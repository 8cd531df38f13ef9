"""The coordinator actor: turns messages into events for the machine, and the machine's commands into messages."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, assert_never

import msgspec

from asyncpipe.actors import Actor, ActorRef, Down
from asyncpipe.errors import AsyncPipeError, Invalid, StageLost, WireError, from_data, to_data
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
    Updates,
    Usage,
    Welcome,
    WorkerToCoordinator,
)
from asyncpipe.wire.sampling import MAX_CHOICES
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.shell.outbox import Outbox, SendFailed
from asyncpipe_coordinator.shell.pool import WorkerPool
from asyncpipe_coordinator.shell.requests import OpenChoice, Recipient, Update
from asyncpipe_coordinator.text import TextCodec

COORDINATOR_ACTOR = "coordinator"
TICK_S = 0.25
CLIENT_STALL_S = 20.0  # a client that takes nothing for so long is cut off
SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbouring choices get unrelated seeds


@dataclass(frozen=True, slots=True)
class PipelineUp:
    """Local: the pool's workers are loaded and connected."""

    pool: WorkerPool


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """Local: a worker of `epoch` died or failed."""

    epoch: int
    error: AsyncPipeError


@dataclass(frozen=True, slots=True)
class Tick:
    """Local: time has passed."""


@dataclass(frozen=True, slots=True)
class InFlight:
    step: Step
    issued_at_s: float


LocalMessage = PipelineUp | WorkerLost | Tick | SendFailed | Down
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
        on_pipeline_lost: Callable[[AsyncPipeError], None],
    ) -> None:
        self._machine = machine
        self._codec = codec
        self._model = model
        self._step_timeout_s = step_timeout_s
        self._on_pipeline_lost = on_pipeline_lost
        self._pool: WorkerPool | None = None  # joining or running
        self._is_up = False
        self._in_flight: dict[int, InFlight] = {}
        self._open: dict[str, OpenChoice] = {}  # by the machine's request id
        self._clients: dict[ActorRef, Recipient] = {}
        self._with_updates: list[Recipient] = []  # to be sent to when the message at hand is dealt with
        self._num_clients = 0

    # --- for the service, on the same loop ---

    def expect(self, pool: WorkerPool) -> None:
        """Workers that join from now on belong to `pool`."""
        self._pool = pool

    @property
    def pool(self) -> WorkerPool | None:
        return self._pool

    @property
    def is_up(self) -> bool:
        return self._is_up

    # --- messages ---

    async def handle(self, message: AnyMessage) -> Message | None:
        try:
            return self._dispatch(message)
        finally:
            self._send_updates()

    def _dispatch(self, message: AnyMessage) -> Message | None:
        match message:
            case Tokens():
                self._on_tokens(message)
            case Generate():
                return self._on_generate(message)
            case Cancel():
                self._on_cancel(message.request_id, self._sender())
            case Join():
                return self._on_join(message)
            case StageFailed():
                self._on_stage_failed(message)
            case PipelineUp():
                self._on_pipeline_up(message.pool)
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

    def _on_generate(self, message: Generate) -> Accepted:
        token_ids = self._prompt_tokens(message)
        key = self._unique(message.request_id)
        client = self._client(self._sender())
        sampling, now_s = message.sampling, time.monotonic()
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        for choice in range(sampling.n):
            self._open[_choice_id(key, choice)] = OpenChoice.create(
                message.request_id, choice, client=client, codec=self._codec, sampling=sampling
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
                )
            )
        return Accepted(request_id=message.request_id, prompt_token_ids=token_ids)

    def _prompt_tokens(self, message: Generate) -> tuple[int, ...]:
        if (message.prompt is None) == (message.prompt_token_ids is None):
            raise Invalid("give either prompt or prompt_token_ids")
        token_ids = message.prompt_token_ids
        if token_ids is None:
            token_ids = self._codec.encode(message.prompt or "")
        check_prompt(token_ids, self._model)
        return token_ids

    def _on_tokens(self, tokens: Tokens) -> None:
        sent = self._in_flight.get(tokens.micro_batch)
        if sent is not None and sent.step.epoch == tokens.epoch and sent.step.step == tokens.step:
            del self._in_flight[tokens.micro_batch]
        try:
            self._handle(events.TokensArrived(tokens=tokens, at_s=time.monotonic()))
        except WireError as error:
            self._lose_pipeline(StageLost(f"the last stage broke the protocol: {error}"))

    def _on_cancel(self, client_request_id: str, client: ActorRef) -> None:
        for request_id, open_choice in list(self._open.items()):
            if open_choice.client.ref == client and open_choice.request_id == client_request_id:
                self._handle(events.Cancelled(request_id=request_id, at_s=time.monotonic()))

    def _on_join(self, message: Join) -> Welcome:
        if self._pool is None:
            raise Invalid("no workers are expected now")
        sender = self._sender()
        self._pool.on_join(message, sender)
        self.system.monitor(sender, watcher=self.ref)
        return Welcome(epoch=self._pool.epoch)

    def _on_pipeline_up(self, pool: WorkerPool) -> None:
        self._is_up = True
        self._handle(events.PipelineReady(epoch=pool.epoch, kv_blocks=pool.kv_blocks, at_s=time.monotonic()))

    def _on_tick(self) -> None:
        now_s = time.monotonic()
        self._handle(events.Tick(at_s=now_s))
        for sent in self._in_flight.values():
            if now_s - sent.issued_at_s > self._step_timeout_s:
                self._lose_pipeline(
                    StageLost(
                        f"no tokens came back for micro-batch {sent.step.micro_batch}, step {sent.step.step},"
                        f" within {self._step_timeout_s:g} s"
                    )
                )
                return

    # --- losses ---

    def _on_stage_failed(self, message: StageFailed) -> None:
        if self._pool is not None and message.epoch == self._pool.epoch:
            cause = from_data(message.error)
            self._lose_pipeline(StageLost(f"{self._pool.describe(message.stage)} failed: {cause}"))

    def _on_worker_lost(self, message: WorkerLost) -> None:
        if self._pool is not None and message.epoch == self._pool.epoch:
            self._lose_pipeline(message.error)

    def _on_send_failed(self, message: SendFailed) -> None:
        if self._pool is not None and message.target == self._pool.first:
            self._lose_pipeline(self._pool.lost(0, message.error))
        else:
            self._drop_client(message.target)

    def _on_down(self, message: Down) -> None:
        stage = self._pool.stage_of(message.ref) if self._pool is not None else None
        if stage is not None and self._pool is not None:
            self._lose_pipeline(self._pool.lost(stage, message.error.message))
        elif message.ref in self._clients:
            self._drop_client(message.ref)

    def _lose_pipeline(self, error: AsyncPipeError) -> None:
        """Once per epoch: everyone who waits hears of it, and the service decides whether to start again."""
        if not self._is_up:
            return
        self._is_up = False
        self._in_flight.clear()
        self._handle(events.PipelineLost(error=to_data(error), at_s=time.monotonic()))
        self._on_pipeline_lost(error)

    # --- clients ---

    def _client(self, ref: ActorRef) -> Recipient:
        if ref not in self._clients:
            self._num_clients += 1
            name = f"client-{self._num_clients}"
            outbox = Outbox(ref, owner=self.ref, timeout_s=CLIENT_STALL_S)
            self._clients[ref] = Recipient(ref, outbox, self.system.spawn(lambda: outbox, name=name))
            self.system.monitor(ref, watcher=self.ref)
        return self._clients[ref]

    def _drop_client(self, ref: ActorRef) -> None:
        """Gone, or too slow: its requests end, nobody else's do."""
        client = self._clients.pop(ref, None)
        if client is None:
            return
        self.background(self.system.stop(client.outbox_ref), name="stop outbox")
        for request_id in [r for r, request in self._open.items() if request.client is client]:
            self._handle(events.Cancelled(request_id=request_id, at_s=time.monotonic()))

    def _update(self, client: Recipient, update: Update) -> None:
        if not client.updates:
            self._with_updates.append(client)
        client.updates.append(update)

    def _send_updates(self) -> None:
        """One message a client for all that has happened to its requests."""
        for client in self._with_updates:
            updates, client.updates = client.updates, []
            if client.ref not in self._clients:
                continue
            try:
                client.outbox.post(Updates(updates=tuple(updates)), outbox=client.outbox_ref)
            except AsyncPipeError as error:
                self.ref.signal(SendFailed(client.ref, error))
        self._with_updates.clear()

    # --- commands ---

    def _handle(self, event: events.Event) -> None:
        done = self._machine.handle(event)
        ending = {c.request_id for c in done if isinstance(c, commands.FinishRequest)}
        for command in done:
            match command:
                case commands.EmitToken():
                    self._emit(command, is_last=command.request_id in ending)
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
        self._in_flight[step.micro_batch] = InFlight(step, time.monotonic())
        try:
            # There are more credits than micro-batches, so this is never Busy.
            self._pool.first.tell_nowait(step)
        except AsyncPipeError as error:
            self.ref.signal(SendFailed(self._pool.first, error))

    def _emit(self, command: commands.EmitToken, *, is_last: bool) -> None:
        request = self._open.get(command.request_id)
        if request is None or request.stopped:
            return
        self._update(request.client, request.piece(command, is_last=is_last))
        if request.stops.found:
            request.stopped = True
            self._handle(events.StopStringFound(request_id=command.request_id, at_s=time.monotonic()))

    def _score(self, command: commands.EmitPromptLogprobs) -> None:
        request = self._open.get(command.request_id)
        if request is not None:
            self._update(request.client, PromptScored(request_id=request.request_id, logprobs=command.logprobs))

    def _finish(self, command: commands.FinishRequest) -> None:
        request = self._open.pop(command.request_id, None)
        if request is None:
            return
        held_back = "" if request.stops.found else request.rest()
        usage = Usage(
            prompt_tokens=command.num_prompt_tokens,
            completion_tokens=command.num_completion_tokens,
            time_to_first_token_s=command.time_to_first_token_s,
            total_s=command.total_s,
        )
        finished = Finished(
            request_id=request.request_id,
            finish_reason=command.finish_reason,
            text=held_back,
            usage=usage,
            choice=request.choice,
        )
        self._update(request.client, finished)

    def _fail(self, command: commands.FailRequest) -> None:
        """One choice that fails takes the others of its request with it."""
        request = self._open.pop(command.request_id, None)
        if request is None:
            return
        self._update(request.client, Failed(request_id=request.request_id, error=command.error))
        self._on_cancel(request.request_id, request.client.ref)

    # --- small things ---

    def _sender(self) -> ActorRef:
        if self.sender is None:
            raise Invalid("this message needs a sender to answer to")
        return self.sender

    def _unique(self, request_id: str) -> str:
        """Two clients may choose the same id; one client may not use it twice at once."""
        key = f"{self._sender().node}/{request_id}"
        if any(_choice_id(key, choice) in self._open for choice in range(MAX_CHOICES)):
            raise Invalid(f"request id {request_id!r} is in use; ids must be unique")
        return key


def _choice_id(key: str, choice: int) -> str:
    """The machine's id of one choice of a request."""
    return f"{key}#{choice}"


def check_prompt(token_ids: tuple[int, ...], model: ModelInfo) -> None:
    """Raises Invalid for a prompt that the model cannot take."""
    if not token_ids:
        raise Invalid("the prompt is empty: give at least one token")
    if len(token_ids) >= model.max_context_len:
        raise Invalid(
            f"the prompt has {len(token_ids)} tokens; the model's context is {model.max_context_len},"
            f" so a prompt may have at most {model.max_context_len - 1}"
        )
    if max(token_ids) >= model.vocab_size:
        raise Invalid(f"token id {max(token_ids)} is outside the model's vocabulary of {model.vocab_size}")
