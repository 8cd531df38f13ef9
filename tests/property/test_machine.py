"""The scheduling core under random arrivals, answers in any order, cancels, deadlines and losses."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncpipe.errors import ErrorCode, ErrorData
from asyncpipe.wire.messages import Sampling, Step, Tokens
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.machine import Limits, Machine

EOS = 2
LIMITS = Limits(
    num_micro_batches=3,
    max_sequences_per_micro_batch=2,
    max_waiting=5,
    max_context_len=12,
    eos_token_ids=frozenset({EOS}),
)


class PipelineModel(RuleBasedStateMachine):
    """Plays the stages and the clients, and keeps its own books of both."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(LIMITS)
        self.now_s = 0.0
        self.epoch = 0
        self.is_up = False
        self.in_flight: dict[int, Step] = {}
        self.on_stages: dict[int, list[int]] = {}  # sequences of each micro-batch, as the deltas tell it
        self.submitted: set[str] = set()
        self.next_index: dict[str, int] = {}
        self.ended: set[str] = set()

    def handle(self, event: events.Event) -> None:
        for command in self.machine.handle(event):
            match command:
                case commands.IssueStep(step):
                    self.take_step(step)
                case commands.EmitToken(request_id, index, _):
                    assert request_id not in self.ended
                    assert index == self.next_index[request_id]
                    self.next_index[request_id] += 1
                case commands.FinishRequest() | commands.FailRequest():
                    assert command.request_id in self.submitted
                    assert command.request_id not in self.ended, "a request ended twice"
                    self.ended.add(command.request_id)

    def take_step(self, step: Step) -> None:
        assert self.is_up
        assert step.epoch == self.epoch
        assert step.micro_batch not in self.in_flight, "a micro-batch is in two places"
        members = self.on_stages.setdefault(step.micro_batch, [])
        for number in step.delta.left:
            members.remove(number)
        assert len(step.delta.token_ids) == len(members)
        members += [joined.sequence for joined in step.delta.joined]
        assert len(members) <= LIMITS.max_sequences_per_micro_batch
        self.in_flight[step.micro_batch] = step

    @precondition(lambda self: not self.is_up)
    @rule()
    def pipeline_comes_up(self) -> None:
        self.epoch += 1
        self.is_up = True
        self.on_stages.clear()
        self.handle(events.PipelineReady(epoch=self.epoch, at_s=self.now_s))

    @precondition(lambda self: self.is_up)
    @rule()
    def pipeline_is_lost(self) -> None:
        self.is_up = False
        self.in_flight.clear()
        error = ErrorData(ErrorCode.STAGE_LOST, "stage 1 was lost")
        self.handle(events.PipelineLost(error=error, at_s=self.now_s))
        assert self.ended == self.submitted

    @rule(
        prompt_len=st.integers(1, 13),
        max_new_tokens=st.none() | st.integers(1, 5),
        ignore_eos=st.booleans(),
        deadline_s=st.none() | st.floats(0.1, 5.0),
    )
    def client_submits(self, prompt_len: int, max_new_tokens: int | None, ignore_eos: bool, deadline_s: float | None) -> None:
        request_id = f"r{len(self.submitted)}"
        self.submitted.add(request_id)
        self.next_index[request_id] = 0
        self.handle(
            events.Submitted(
                request_id=request_id,
                client="client",
                prompt_token_ids=(5,) * prompt_len,
                sampling=Sampling(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos),
                seed=0,
                deadline_at_s=None if deadline_s is None else self.now_s + deadline_s,
                at_s=self.now_s,
            )
        )

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def stages_answer_some_micro_batch(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.in_flight)))
        step = self.in_flight.pop(index)
        num_sequences = len(self.on_stages[index])
        tokens = data.draw(st.lists(st.sampled_from([EOS, 7, 8]), min_size=num_sequences, max_size=num_sequences))
        self.handle(
            events.TokensArrived(
                tokens=Tokens(epoch=step.epoch, micro_batch=index, step=step.step, token_ids=tuple(tokens)), at_s=self.now_s
            )
        )

    @rule()
    def a_stale_answer_changes_nothing(self) -> None:
        stale = Tokens(epoch=self.epoch + 1000, micro_batch=0, step=0, token_ids=(7,))
        assert self.machine.handle(events.TokensArrived(tokens=stale, at_s=self.now_s)) == []

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), by_stop_string=st.booleans())
    def a_request_is_ended_from_outside(self, data: st.DataObject, by_stop_string: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.submitted)))
        kind = events.StopStringFound if by_stop_string else events.Cancelled
        self.handle(kind(request_id=request_id, at_s=self.now_s))
        assert request_id in self.ended

    @rule(seconds=st.floats(0.0, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.handle(events.Tick(at_s=self.now_s))

    @invariant()
    def the_books_agree(self) -> None:
        self.machine.check()

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if self.is_up and self.submitted != self.ended:
            assert self.in_flight, "requests are open and no step is in flight"

    @invariant()
    def stages_hold_no_sequence_without_a_step_to_come(self) -> None:
        if self.is_up:
            assert all(index in self.in_flight for index, members in self.on_stages.items() if members)


PipelineModel.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = PipelineModel.TestCase
