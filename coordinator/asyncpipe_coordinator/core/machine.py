"""The scheduling core: events in, commands out, nothing else.

M micro-batches are in the pipeline at once, with no barrier between them: the moment one's tokens have come back it is issued
again, with whoever joined or left meanwhile. Where nobody joins, several short steps are issued at once: the stages go on by
themselves with the tokens that the last one has just chosen. The machine neither waits nor looks at a clock; it is told.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import assert_never

from asyncpipe.errors import AsyncPipeError, Busy, ErrorData, Invalid, Timeout, WireError, to_data
from asyncpipe.wire.messages import Delta, FinishReason, Step, Tokens
from asyncpipe_coordinator.core import continuous, static
from asyncpipe_coordinator.core.blocks import BlockLedger
from asyncpipe_coordinator.core.books import Books
from asyncpipe_coordinator.core.commands import (
    Command,
    EmitPromptLogprobs,
    EmitToken,
    FailRequest,
    FinishRequest,
    IssueStep,
)
from asyncpipe_coordinator.core.efficiency import EfficiencyMeter
from asyncpipe_coordinator.core.events import (
    Cancelled,
    Event,
    PipelineGone,
    PipelineLost,
    PipelineReady,
    StopStringFound,
    Submitted,
    Tick,
    TokensArrived,
)
from asyncpipe_coordinator.core.limits import Limits, Schedule
from asyncpipe_coordinator.core.sequences import InFlight, MicroBatch, Sequence, SequenceState
from asyncpipe_coordinator.core.tuning import Tuner

RETUNE_STEPS = 16  # steps between two looks at the number of micro-batches
RECENT_ENDS = 32  # ended requests from which the hint of Busy is taken
RETRY_HINT_S = 1.0  # before any has ended


@dataclass(frozen=True, slots=True)
class MachineStatistics:
    open: int
    waiting: int
    running: int
    finished: int
    failed: int
    prompt_tokens: int
    generated_tokens: int
    num_micro_batches: int
    num_blocks: int
    used_blocks: int
    preemptions: int


class Machine:
    """`handle` one event at a time; `check` may be called between any two."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.meter = EfficiencyMeter(limits.num_stages)
        self.tuner = Tuner(limits.num_stages)
        self._epoch: int | None = None  # None: no pipeline
        self._is_automatic = limits.num_micro_batches is None and limits.schedule is Schedule.CONTINUOUS
        self._is_ring = self._may_try = False  # of this pipeline: whether numbers of micro-batches are found by trial
        self._gone: ErrorData | None = None
        self._open: dict[str, Sequence] = {}  # requests whose client waits for an end
        self._books = Books(limits, BlockLedger(num_blocks=0, block_tokens=limits.kv_block_tokens))
        self._compose = static.compose if limits.schedule is Schedule.STATIC else continuous.compose
        self._arrivals = self._steps_since_retune = 0
        self._finished = self._failed = self._prompt_tokens = self._generated_tokens = 0
        self._ends_at_s: deque[float] = deque(maxlen=RECENT_ENDS)

    def handle(self, event: Event) -> list[Command]:
        """What has to be done now. Raises WireError for tokens that no step asked for."""
        match event:
            case Submitted():
                return self._on_submitted(event)
            case TokensArrived():
                return self._on_tokens(event.tokens, event.at_s)
            case Cancelled():
                return self._end(event.request_id, FinishReason.CANCELLED, event.at_s) + self._issue_idle(event.at_s)
            case StopStringFound():
                return self._end(event.request_id, FinishReason.STOP, event.at_s) + self._issue_idle(event.at_s)
            case PipelineReady():
                return self._on_ready(event)
            case PipelineLost():
                return self._on_lost()
            case PipelineGone():
                return self._on_gone(event.error)
            case Tick():
                return self._on_tick(event.at_s)
            case _:
                assert_never(event)

    def statistics(self) -> MachineStatistics:
        books = self._books
        return MachineStatistics(
            open=len(self._open),
            waiting=len(books.waiting),
            running=len(self._open) - len(books.waiting),
            finished=self._finished,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            num_micro_batches=books.num_open,
            num_blocks=books.ledger.num_blocks,
            used_blocks=books.ledger.num_used,
            preemptions=books.num_preemptions,
        )

    @property
    def max_context_len(self) -> int:
        """Of the model, or what fits into the KV memory when that is less."""
        return self.limits.max_context_len if self._epoch is None else self._books.max_context_len

    def step_awaited_since(self, at_s: float) -> Step | None:
        """One whose tokens have been awaited since before then, if there is any."""
        in_flight = (batch.in_flight for batch in self._books.micro_batches)
        return next((flight.step for flight in in_flight if flight is not None and flight.since_s < at_s), None)

    # --- requests ---

    def _on_submitted(self, request: Submitted) -> list[Command]:
        if (refusal := self._refusal(request)) is not None:
            self._failed += 1
            return [FailRequest(request.request_id, refusal)]
        ends = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            ends |= self.limits.eos_token_ids
        generated = list(request.generated_token_ids)
        sequence = Sequence(self._arrivals, self._books.number(), request, generated=generated, may_end_with=ends)
        self._arrivals += 1
        self._open[request.request_id] = sequence
        self._books.waiting.push(sequence)
        self._prompt_tokens += len(request.prompt_token_ids)
        if generated:
            sequence.most_generated = sequence.most_within(self.max_context_len)
            if ended := self._end_if_due(sequence, generated[-1], request.at_s):
                return ended  # only its last words were lost
        if self._takes_turns:
            self._open_micro_batches()
        return self._issue_idle(request.at_s)

    def _refusal(self, request: Submitted) -> ErrorData | None:
        if self._gone is not None:
            return self._gone
        error: AsyncPipeError | None = None
        length, limit, num_waiting = len(request.prompt_token_ids), self.max_context_len, len(self._books.waiting)
        num_tokens = length + len(request.generated_token_ids)
        if request.request_id in self._open:
            error = Invalid(f"request id {request.request_id!r} is in use; ids must be unique")
        elif not 0 < length <= num_tokens < limit:
            error = Invalid(f"a prompt of {num_tokens} tokens; this pipeline takes 1 to {limit - 1}")
        elif num_waiting >= self.limits.max_waiting:
            error = Busy(f"{num_waiting} requests are waiting already", retry_after_s=self._retry_after_s())
        return None if error is None else to_data(error)

    def _retry_after_s(self) -> float:
        """Requests end about once in this many seconds."""
        if len(self._ends_at_s) < 2:
            return RETRY_HINT_S
        return max((self._ends_at_s[-1] - self._ends_at_s[0]) / (len(self._ends_at_s) - 1), 0.001)

    def _end(self, request_id: str, reason: FinishReason, at_s: float) -> list[Command]:
        """To the client it ends now; the stages hear of it with the next delta. An unknown id has ended before."""
        sequence = self._open.pop(request_id, None)
        if sequence is None:
            return []
        self._books.forget(sequence)
        self._finished += 1
        self._ends_at_s.append(at_s)
        return [_finish(sequence, reason, at_s)]

    def _on_tick(self, now_s: float) -> list[Command]:
        late = [s for s in self._open.values() if s.request.deadline_at_s is not None and s.request.deadline_at_s < now_s]
        commands: list[Command] = []
        for sequence in late:
            del self._open[sequence.request.request_id]
            self._books.forget(sequence)
            self._failed += 1
            waited_s = now_s - sequence.request.at_s
            error = Timeout(f"its deadline passed after {waited_s:.1f} s, with {len(sequence.generated)} tokens generated")
            commands.append(FailRequest(sequence.request.request_id, to_data(error)))
        return commands + self._issue_idle(now_s)

    # --- the pipeline ---

    def _on_ready(self, event: PipelineReady) -> list[Command]:
        if self._epoch is not None:
            raise RuntimeError(f"epoch {event.epoch} is ready while epoch {self._epoch} runs")
        self._epoch, self._gone = event.epoch, None
        self._is_ring, self._may_try = event.is_ring, event.shares_memory and self._is_automatic
        self._books.ledger = BlockLedger(num_blocks=event.kv_blocks, block_tokens=self.limits.kv_block_tokens)
        self._open_micro_batches()
        return self._fail_unfit() + self._issue_idle(event.at_s)

    def _fail_unfit(self) -> list[Command]:
        """Requests that came before it was known how much the KV memory holds, and are too long for it."""
        unfit = [s for s in self._books.waiting if s.length >= self.max_context_len]
        for sequence in unfit:
            del self._open[sequence.request.request_id]
            self._books.forget(sequence)
        self._failed += len(unfit)
        error = Invalid(f"the prompt is too long: this pipeline's KV memory takes 1 to {self.max_context_len - 1} tokens")
        return [FailRequest(sequence.request.request_id, to_data(error)) for sequence in unfit]

    def _on_lost(self) -> list[Command]:
        """What was in flight is lost. The next pipeline computes every sequence from its prompt and its tokens so far."""
        self._epoch, self._may_try = None, False
        self._books = self._books.without_pipeline()
        self.meter.emptied()
        return []

    def _on_gone(self, error: ErrorData) -> list[Command]:
        self._on_lost()
        self._gone = error
        failed = list(self._open)
        for sequence in self._open.values():
            self._books.forget(sequence)
        self._failed += len(failed)
        self._open.clear()
        return [FailRequest(request_id, error) for request_id in failed]

    def _on_tokens(self, tokens: Tokens, at_s: float) -> list[Command]:
        if tokens.epoch != self._epoch:
            return []  # of a pipeline that is no more
        sampled = self._answer(tokens, at_s)
        emitted: list[Command] = self._on_prompt_logprobs(tokens)
        logprobs = tokens.logprobs or (None,) * len(tokens.token_ids)
        for sequence, token_id, scores in zip(sampled, tokens.token_ids, logprobs, strict=True):
            if sequence.state is SequenceState.DONE:
                continue
            emitted.append(EmitToken(sequence.request.request_id, len(sequence.generated), token_id, scores))
            sequence.generated.append(token_id)
            self._generated_tokens += 1
            if sequence.first_token_at_s is None:
                sequence.first_token_at_s = at_s
            if token_id in sequence.may_end_with or len(sequence.generated) >= sequence.most_generated:
                emitted += self._end_if_due(sequence, token_id, at_s)
        # The stages first: they work on the next step while clients get the tokens of this one.
        return self._issue_idle(at_s) + emitted

    def _end_if_due(self, sequence: Sequence, token_id: int, at_s: float) -> list[Command]:
        num_generated, request = len(sequence.generated), sequence.request
        if token_id in sequence.may_end_with and num_generated >= request.sampling.min_tokens:
            return self._end(request.request_id, FinishReason.STOP, at_s)
        if num_generated >= sequence.most_generated:
            return self._end(request.request_id, FinishReason.LENGTH, at_s)
        return []

    def _on_prompt_logprobs(self, tokens: Tokens) -> list[Command]:
        if not tokens.prompt_logprobs:
            return []
        by_number = {sequence.number: sequence for sequence in self._open.values()}
        found = (
            (by_number[scored.sequence], scored.logprobs) for scored in tokens.prompt_logprobs if scored.sequence in by_number
        )
        unseen = [(sequence.request.request_id, sequence.scores.unseen(logprobs)) for sequence, logprobs in found]
        return [EmitPromptLogprobs(request_id, logprobs) for request_id, logprobs in unseen if logprobs]

    def _answer(self, tokens: Tokens, at_s: float) -> tuple[Sequence, ...]:
        """Whose each of them is. After the last of its steps the micro-batch rests again. Raises WireError."""
        if len(tokens.timings) != self.limits.num_stages:
            raise WireError(f"tokens with {len(tokens.timings)} timings; the pipeline has {self.limits.num_stages} stages")
        if tokens.micro_batch >= len(self._books.micro_batches):
            raise WireError(f"tokens for micro-batch {tokens.micro_batch}, of which there is none")
        micro_batch = self._books.micro_batches[tokens.micro_batch]
        in_flight = micro_batch.in_flight
        if in_flight is None or in_flight.next_number != tokens.step:
            raise WireError(f"tokens for step {tokens.step} of micro-batch {tokens.micro_batch}, which is not in flight")
        num_steps = in_flight.num_awaited if self.limits.num_stages == 1 or in_flight.step.is_gathered else 1
        sampled = in_flight.sampled * num_steps
        if len(tokens.token_ids) != len(sampled) or len(tokens.logprobs) not in (0, len(sampled)):
            raise WireError(f"{len(tokens.token_ids)} tokens, where {len(sampled)} were to come")
        self._measure(in_flight, tokens, at_s, num_steps)
        in_flight.num_back, in_flight.since_s = in_flight.num_back + num_steps, at_s
        if not in_flight.num_awaited:
            self._books.come_back(micro_batch)
        return sampled

    def _measure(self, in_flight: InFlight, tokens: Tokens, at_s: float, num_steps: int) -> None:
        has_prompts = bool(in_flight.step.delta.chunks)
        self.meter.returned([timing.compute_us / 1e6 for timing in tokens.timings], at_s, num_steps=num_steps)
        self.tuner.observe(
            num_rows=in_flight.step.delta.num_rows,
            timings=tokens.timings,
            round_trip_s=at_s - in_flight.since_s,
            num_steps=num_steps,
            has_prompts=has_prompts,
            in_turns=self._takes_turns,
        )
        if self._may_try:
            self._measure_trial(in_flight.since_s, at_s, num_steps)
        self._steps_since_retune += num_steps
        if self._steps_since_retune >= RETUNE_STEPS or (has_prompts and not self._books.num_uncomputed):
            self._steps_since_retune = 0
            self._open_micro_batches()

    def _measure_trial(self, since_s: float, at_s: float, num_steps: int) -> None:
        """Of the number of micro-batches that are in flight: only of decoding, for prompts take their own time."""
        flights = [batch.in_flight for batch in self._books.micro_batches if batch.in_flight is not None]
        have_prompts = self._books.num_uncomputed or any(flight.step.delta.chunks for flight in flights)
        self.tuner.observe_decoding(
            num_micro_batches=len(flights),
            num_sequences=0 if have_prompts else self._books.num_running,
            issued_at_s=since_s,
            at_s=at_s,
            num_steps=num_steps,
        )

    def _open_micro_batches(self) -> None:
        """A number that the user has fixed is never exceeded."""
        self._books.open_micro_batches(self._wanted_micro_batches(), with_spare=self._is_automatic)

    def _wanted_micro_batches(self) -> int:
        limits, books = self.limits, self._books
        if not self._is_automatic:
            return limits.num_micro_batches or limits.num_stages
        num_sequences = books.num_admitted + len(books.waiting)
        most_sequences = limits.max_sequences_per_micro_batch
        best = self.tuner.best(
            num_sequences=num_sequences,
            max_sequences=most_sequences,
            most=limits.most_micro_batches,
            may_try=self._may_try and not books.num_uncomputed,
        )
        return max(best, -(-books.num_admitted // most_sequences))

    @property
    def _takes_turns(self) -> bool:
        """One stage computes while the others rest, for that has been quicker: for those who decode, not for prompts."""
        return self._may_try and self._books.num_open < self.limits.num_stages

    # --- issuing ---

    def _issue_idle(self, at_s: float) -> list[Command]:
        """Issue micro-batches that rest while there is something for them to do.

        First those that only give their members away, so that others can take them; then the emptiest; a spare one last.
        """
        if self._epoch is None:
            return []
        idle = [batch for batch in self._books.micro_batches if batch.in_flight is None]
        if self.limits.schedule is Schedule.BARRIER and len(idle) < len(self._books.micro_batches):
            return []
        commands: list[Command] = []
        for micro_batch in sorted(idle, key=self._turn):
            commands += self._issue(self._epoch, micro_batch, at_s)
        if not any(batch.in_flight for batch in self._books.micro_batches):
            self.meter.emptied()
        return commands

    def _turn(self, micro_batch: MicroBatch) -> tuple[int, int]:
        is_spare, num_members = self._books.is_spare(micro_batch), len(micro_batch.members)
        return (0 if is_spare and num_members else 2 if is_spare else 1, num_members)

    def _issue(self, epoch: int, micro_batch: MicroBatch, at_s: float) -> list[Command]:
        delta = self._compose(
            self._books, micro_batch, most_steps=self._most_steps(micro_batch), idle_prefill=self._idle_prefill()
        )
        if delta == Delta():
            return []
        is_alone = self._is_alone(micro_batch)
        is_gathered = self.limits.num_stages > 1 and self.tuner.are_short(delta.num_steps, delta.num_rows)
        step = Step(
            epoch=epoch,
            micro_batch=micro_batch.index,
            step=micro_batch.next_step,
            delta=delta,
            is_alone=is_alone,
            is_gathered=is_gathered,
        )
        micro_batch.next_step += delta.num_steps
        micro_batch.in_flight = InFlight(step, tuple(micro_batch.members), at_s)
        self.meter.issued(at_s)
        return [IssueStep(step)]

    def _most_steps(self, micro_batch: MicroBatch) -> int:
        """That may be issued at once. With fewer sequences than micro-batches a newcomer finds one that rests."""
        books, limits = self._books, self.limits
        take_turns = limits.num_stages == 1 and books.num_open > 1
        if not self._is_ring or limits.schedule is not Schedule.CONTINUOUS or take_turns or self._is_settling:
            return 1
        holds_up = books.num_admitted + len(books.waiting) >= books.num_open
        return self.tuner.steps_at_once(len(micro_batch.members), holds_up=holds_up)

    @property
    def _is_settling(self) -> bool:
        """Somebody is still in a spare micro-batch; or the last prompts are at their end, when another number may be best."""
        batches = self._books.micro_batches
        if any(batch.members for batch in batches if self._books.is_spare(batch)):
            return True
        has_prompts = any(batch.in_flight.step.delta.chunks for batch in batches if batch.in_flight is not None)
        return self._may_try and has_prompts and not self._books.num_uncomputed

    def _is_alone(self, micro_batch: MicroBatch) -> bool:
        """Whether no other has anything to compute in the pipeline, nor will have by what is known now."""
        books = self._books
        others = [batch for batch in books.micro_batches if batch is not micro_batch]
        are_flying = any(other.in_flight.step.delta.num_rows for other in others if other.in_flight is not None)
        will_fly = any(other.members for other in others) or books.parked or books.num_uncomputed
        return self.limits.num_stages > 1 and not (are_flying or will_fly)

    def _idle_prefill(self) -> int:
        """Of prompts, for a step in which nobody decodes. What is brought here for each step is brought as seldom as can be."""
        num_tokens, most = self._books.num_uncomputed, self.limits.max_step_tokens
        if not num_tokens or self._books.num_running or self.limits.prefill_spread_steps == 1:
            return most
        return self.tuner.part(num_tokens, most=most)

    # --- invariants ---

    def check(self) -> None:
        """Raises AssertionError when the machine's own books do not agree."""
        books = self._books
        books.check()
        places = [*books.waiting, *books.prefilling, *books.parked, *(m for b in books.micro_batches for m in b.members)]
        _assert(
            set(map(id, places)) == set(map(id, self._open.values())), "an open request is nowhere, or an ended one somewhere"
        )
        resting = [batch for batch in books.micro_batches if batch.in_flight is None]
        if self._epoch is not None and self.limits.schedule is not Schedule.BARRIER:
            _assert(not any(batch.members for batch in resting), "a micro-batch with members rests")
        if self._epoch is not None and len(resting) == len(books.micro_batches):
            _assert(not places and not books.to_forget, "there is work and the pipeline is empty")


def _finish(sequence: Sequence, reason: FinishReason, at_s: float) -> FinishRequest:
    request = sequence.request
    first_s = sequence.first_token_at_s
    return FinishRequest(
        request_id=request.request_id,
        finish_reason=reason,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_completion_tokens=len(sequence.generated),
        time_to_first_token_s=0.0 if first_s is None else first_s - request.at_s,
        total_s=at_s - request.at_s,
    )


def _assert(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
