"""The scheduling core: events in, commands out, nothing else.

M micro-batches are in the pipeline at once, with no barrier between them: the moment one's tokens have come back it is issued
again, with whoever joined or left meanwhile. The machine neither waits nor looks at a clock; it is told.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import assert_never

from asyncpipe.errors import AsyncPipeError, Busy, ErrorData, Invalid, Timeout, WireError, to_data
from asyncpipe.wire.messages import FinishReason, Tokens
from asyncpipe_coordinator.core.commands import Command, EmitToken, FailRequest, FinishRequest, IssueStep
from asyncpipe_coordinator.core.events import (
    Cancelled,
    Event,
    PipelineLost,
    PipelineReady,
    StopStringFound,
    Submitted,
    Tick,
    TokensArrived,
)
from asyncpipe_coordinator.core.sequences import MicroBatch, Sequence, SequenceState

RETRY_HINT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    num_micro_batches: int
    max_sequences_per_micro_batch: int
    max_waiting: int
    max_context_len: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class MachineStatistics:
    waiting: int
    running: int
    finished: int
    failed: int
    prompt_tokens: int
    generated_tokens: int


class Machine:
    """`handle` one event at a time; `check` may be called between any two."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._epoch: int | None = None  # None: no pipeline
        self._lost: ErrorData | None = None
        self._waiting: deque[Sequence] = deque()
        self._open: dict[str, Sequence] = {}  # requests whose client waits for an end
        self._micro_batches = [MicroBatch(index) for index in range(limits.num_micro_batches)]
        self._next_number = 0
        self._finished = self._failed = self._prompt_tokens = self._generated_tokens = 0

    def handle(self, event: Event) -> list[Command]:
        """What has to be done now. Raises WireError for tokens that no step asked for."""
        match event:
            case Submitted():
                return self._on_submitted(event)
            case TokensArrived():
                return self._on_tokens(event.tokens, event.at_s)
            case Cancelled():
                return self._end(event.request_id, FinishReason.CANCELLED, event.at_s) + self._issue_idle()
            case StopStringFound():
                return self._end(event.request_id, FinishReason.STOP, event.at_s) + self._issue_idle()
            case PipelineReady():
                return self._on_ready(event.epoch)
            case PipelineLost():
                return self._on_lost(event.error)
            case Tick():
                return self._on_tick(event.at_s)
            case _:
                assert_never(event)

    def statistics(self) -> MachineStatistics:
        return MachineStatistics(
            waiting=len(self._waiting),
            running=len(self._open) - len(self._waiting),
            finished=self._finished,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    # --- requests ---

    def _on_submitted(self, request: Submitted) -> list[Command]:
        if (refusal := self._refusal(request)) is not None:
            self._failed += 1
            return [FailRequest(request.request_id, refusal)]
        sequence = Sequence(self._next_number, request)
        self._next_number += 1
        self._open[request.request_id] = sequence
        self._waiting.append(sequence)
        return self._issue_idle()

    def _refusal(self, request: Submitted) -> ErrorData | None:
        if self._lost is not None:
            return self._lost
        error: AsyncPipeError | None = None
        length, limit = len(request.prompt_token_ids), self._limits.max_context_len
        if request.request_id in self._open:
            error = Invalid(f"request id {request.request_id!r} is in use; ids must be unique")
        elif not 0 < length < limit:
            error = Invalid(f"a prompt of {length} tokens; this model takes 1 to {limit - 1}")
        elif len(self._waiting) >= self._limits.max_waiting:
            error = Busy(f"{len(self._waiting)} requests are waiting already", retry_after_s=RETRY_HINT_S)
        return None if error is None else to_data(error)

    def _end(self, request_id: str, reason: FinishReason, at_s: float) -> list[Command]:
        """To the client it ends now; the stages hear of it with the next delta. An unknown id has ended before."""
        sequence = self._open.pop(request_id, None)
        if sequence is None:
            return []
        self._retire(sequence)
        self._finished += 1
        return [_finish(sequence, reason, at_s)]

    def _retire(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            sequence.move(SequenceState.DONE)
        else:
            sequence.move(SequenceState.LEAVING)

    def _on_tick(self, now_s: float) -> list[Command]:
        late = [s for s in self._open.values() if s.request.deadline_at_s is not None and s.request.deadline_at_s < now_s]
        commands: list[Command] = []
        for sequence in late:
            del self._open[sequence.request.request_id]
            self._retire(sequence)
            self._failed += 1
            waited_s = now_s - sequence.request.at_s
            error = Timeout(f"its deadline passed after {waited_s:.1f} s, with {sequence.num_generated} tokens generated")
            commands.append(FailRequest(sequence.request.request_id, to_data(error)))
        return commands + self._issue_idle()

    # --- the pipeline ---

    def _on_ready(self, epoch: int) -> list[Command]:
        if self._epoch is not None:
            raise RuntimeError(f"epoch {epoch} is ready while epoch {self._epoch} runs")
        self._epoch, self._lost = epoch, None
        self._micro_batches = [MicroBatch(index) for index in range(self._limits.num_micro_batches)]
        return self._issue_idle()

    def _on_lost(self, error: ErrorData) -> list[Command]:
        self._epoch, self._lost = None, error
        failed = list(self._open)
        for sequence in self._open.values():
            sequence.move(SequenceState.DONE)
        self._failed += len(failed)
        self._open.clear()
        self._waiting.clear()
        self._micro_batches = []
        return [FailRequest(request_id, error) for request_id in failed]

    def _on_tokens(self, tokens: Tokens, at_s: float) -> list[Command]:
        if tokens.epoch != self._epoch:
            return []  # of a pipeline that is no more
        micro_batch = self._answered(tokens)
        commands: list[Command] = []
        for sequence, token_id in zip(micro_batch.members, tokens.token_ids, strict=True):
            if sequence.state is SequenceState.RUNNING:
                commands += self._on_token(sequence, token_id, at_s)
        # The tokens first, so that clients have them while the stages work on the next ones.
        return commands + self._issue(micro_batch)

    def _answered(self, tokens: Tokens) -> MicroBatch:
        if tokens.micro_batch >= len(self._micro_batches):
            raise WireError(f"tokens for micro-batch {tokens.micro_batch}, of which there is none")
        micro_batch = self._micro_batches[tokens.micro_batch]
        step = micro_batch.in_flight
        if step is None or step.step != tokens.step:
            raise WireError(f"tokens for step {tokens.step} of micro-batch {tokens.micro_batch}, which is not in flight")
        if len(tokens.token_ids) != len(micro_batch.members):
            raise WireError(f"{len(tokens.token_ids)} tokens for {len(micro_batch.members)} sequences")
        micro_batch.in_flight = None
        return micro_batch

    def _on_token(self, sequence: Sequence, token_id: int, at_s: float) -> list[Command]:
        request = sequence.request
        emit = EmitToken(request.request_id, sequence.num_generated, token_id)
        sequence.num_generated += 1
        sequence.last_token = token_id
        self._generated_tokens += 1
        if sequence.first_token_at_s is None:
            sequence.first_token_at_s = at_s
        reason = self._finish_reason(sequence, token_id)
        return [emit] if reason is None else [emit, *self._end(request.request_id, reason, at_s)]

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if token_id in self._limits.eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if sequence.num_generated == sampling.max_new_tokens or sequence.length >= self._limits.max_context_len:
            return FinishReason.LENGTH
        return None

    # --- issuing ---

    def _issue_idle(self) -> list[Command]:
        """Start micro-batches that rest while there is something for them to do, the emptiest first."""
        idle = [batch for batch in self._micro_batches if batch.in_flight is None]
        commands: list[Command] = []
        for micro_batch in sorted(idle, key=MicroBatch.num_staying):
            commands += self._issue(micro_batch)
        return commands

    def _issue(self, micro_batch: MicroBatch) -> list[Command]:
        joining = self._admit(micro_batch)
        if self._epoch is None or not (micro_batch.members or joining):
            return []
        step, left = micro_batch.make_step(self._epoch, joining)
        for sequence in left:
            sequence.move(SequenceState.DONE)
        return [IssueStep(step)]

    def _admit(self, micro_batch: MicroBatch) -> list[Sequence]:
        """Waiting sequences for this micro-batch: its even share of everything that runs or waits."""
        if self._epoch is None:
            return []
        staying = micro_batch.num_staying()
        everyone = sum(batch.num_staying() for batch in self._micro_batches) + len(self._waiting)
        share = -(-everyone // len(self._micro_batches))
        room = min(share, self._limits.max_sequences_per_micro_batch) - staying
        joining = [self._waiting.popleft() for _ in range(min(max(room, 0), len(self._waiting)))]
        for sequence in joining:
            sequence.move(SequenceState.RUNNING)
            self._prompt_tokens += len(sequence.request.prompt_token_ids)
        return joining

    # --- invariants ---

    def check(self) -> None:
        """Raises AssertionError when the machine's own books do not agree."""
        members = [member for batch in self._micro_batches for member in batch.members]
        _assert(len(set(map(id, members))) == len(members), "a sequence is in two places")
        _assert(
            {m.state for m in members} <= {SequenceState.RUNNING, SequenceState.LEAVING},
            "a member neither runs nor leaves",
        )
        _assert(all(s.state is SequenceState.WAITING for s in self._waiting), "a waiting sequence does not wait")
        running = {m.request.request_id for m in members if m.state is SequenceState.RUNNING}
        waiting = {s.request.request_id for s in self._waiting}
        _assert(running | waiting == set(self._open), "an open request is nowhere, or an ended one somewhere")
        _assert(not (running & waiting), "a request waits and runs")
        _assert(len(self._waiting) <= self._limits.max_waiting, "the waiting queue is over its bound")
        for batch in self._micro_batches:
            _assert(batch.num_staying() <= self._limits.max_sequences_per_micro_batch, "a micro-batch is over its bound")
            _assert(batch.in_flight is not None or not batch.members, "a micro-batch with members rests")
        _assert(
            self._epoch is None or not self._waiting or any(batch.in_flight for batch in self._micro_batches),
            "requests wait while the pipeline is empty",
        )


def _finish(sequence: Sequence, reason: FinishReason, at_s: float) -> FinishRequest:
    request = sequence.request
    first_s = sequence.first_token_at_s
    return FinishRequest(
        request_id=request.request_id,
        finish_reason=reason,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_completion_tokens=sequence.num_generated,
        time_to_first_token_s=0.0 if first_s is None else first_s - request.at_s,
        total_s=at_s - request.at_s,
    )


def _assert(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
