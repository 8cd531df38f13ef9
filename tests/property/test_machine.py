"""The scheduling core under random arrivals, cancels, deadlines, losses and too little KV memory."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncpipe.errors import ErrorCode, ErrorData
from asyncpipe.wire.messages import Sampling, StageTiming, Tokens
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core import machine as machine_module
from asyncpipe_coordinator.core.limits import Limits, Schedule
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.core.tuning import Tuner
from tests.fake_stages import FakeStages, next_token

EOS = 2
NUM_STAGES = 2
BLOCK_TOKENS = 4
CONTEXT = 24


def limits(
    schedule: Schedule = Schedule.CONTINUOUS, *, micro_batches: int | None = None, num_stages: int = NUM_STAGES
) -> Limits:
    return Limits(
        num_stages=num_stages,
        num_micro_batches=micro_batches,
        max_sequences_per_micro_batch=3,
        max_waiting=6,
        max_context_len=CONTEXT,
        max_step_tokens=8,
        kv_block_tokens=BLOCK_TOKENS,
        eos_token_ids=frozenset({EOS}),
        schedule=schedule,
    )


class RestlessTuner(Tuner):
    def __init__(self, num_stages: int, rng: random.Random) -> None:
        super().__init__(num_stages)
        self.rng = rng

    def best(self, *, most: int, **_: object) -> int:
        return self.rng.randint(1, min(most, 5))


class PipelineModel(RuleBasedStateMachine):
    """Plays the stages and the clients, and keeps its own books of both."""

    schedule = Schedule.CONTINUOUS
    num_stages = NUM_STAGES
    second_s = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.epoch = 0
        self.is_up = False
        self.stages: FakeStages | None = None
        self.prompts: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    @initialize(micro_batches=st.sampled_from([None, 1, 2, 5]), seed=st.integers(0, 2**16))
    def begin(self, micro_batches: int | None, seed: int) -> None:
        self.rng = random.Random(seed)
        self.machine = self.begin_machine(micro_batches)

    def begin_machine(self, micro_batches: int | None) -> Machine:
        return Machine(limits(self.schedule, micro_batches=micro_batches, num_stages=self.num_stages))

    def handle(self, event: events.Event) -> None:
        alone = None
        for command in self.machine.handle(event):
            match command:
                case commands.IssueStep(step):
                    assert self.stages is not None
                    alone = step.micro_batch if step.is_alone else alone
                    assert step.epoch == self.epoch
                    assert step.delta.num_rows <= self.most_rows()
                    self.stages.take(step)
                case commands.EmitToken(request_id, index, token_id):
                    assert request_id not in self.ended
                    assert index == len(self.tokens[request_id]), "a token was lost or repeated"
                    self.tokens[request_id].append(token_id)
                case commands.FinishRequest() | commands.FailRequest():
                    assert command.request_id in self.prompts
                    assert command.request_id not in self.ended, "a request ended twice"
                    self.ended.add(command.request_id)
        if alone is not None:
            assert self.num_stages > 1
            assert self.stages is not None
            others = [answers for index, answers in self.stages.in_flight.items() if index != alone]
            assert not any(answers[0].num_rows for answers in others), "a step that is alone has company"

    def most_rows(self) -> int:
        """Static batching computes whole prompts."""
        return 3 * CONTEXT if self.schedule is Schedule.STATIC else 8 + 1

    @precondition(lambda self: not self.is_up)
    @rule(num_blocks=st.sampled_from([CONTEXT // BLOCK_TOKENS, 9, 100]), shares_memory=st.booleans())
    def pipeline_comes_up(self, num_blocks: int, shares_memory: bool) -> None:
        self.epoch += 1
        self.is_up = True
        self.stages = FakeStages(
            num_stages=self.num_stages,
            num_blocks=num_blocks,
            block_tokens=BLOCK_TOKENS,
            max_members=3,
            choose=lambda tokens: self.rng.choice([EOS, *[next_token(tokens)] * 3]),
        )
        ready = events.PipelineReady(epoch=self.epoch, kv_blocks=num_blocks, shares_memory=shares_memory, at_s=self.now_s)
        self.handle(ready)

    @precondition(lambda self: self.is_up)
    @rule(surely=st.integers(0, 4))
    def pipeline_is_lost(self, surely: int) -> None:
        """What was in flight with it. The requests go on with the next one."""
        if surely:
            return
        self.is_up, self.stages = False, None
        before = set(self.ended)
        self.handle(events.PipelineLost())
        assert self.ended == before

    @rule(surely=st.integers(0, 9))
    def pipeline_is_gone_for_good(self, surely: int) -> None:
        if surely:
            return
        self.is_up, self.stages = False, None
        self.handle(events.PipelineGone(error=ErrorData(ErrorCode.STAGE_LOST, "stage 1 was lost")))
        assert self.ended == set(self.prompts)

    @rule(
        prompt_len=st.integers(1, CONTEXT + 1),
        max_new_tokens=st.none() | st.integers(1, 12),
        ignore_eos=st.booleans(),
        priority=st.integers(-1, 1),
        deadline_s=st.none() | st.floats(0.1, 5.0),
    )
    def client_submits(
        self, prompt_len: int, max_new_tokens: int | None, ignore_eos: bool, priority: int, deadline_s: float | None
    ) -> None:
        request_id = f"r{len(self.prompts)}"
        self.prompts[request_id] = [len(self.prompts) + 3] * prompt_len
        self.tokens[request_id] = []
        self.handle(
            events.Submitted(
                request_id=request_id,
                client="client",
                prompt_token_ids=tuple(self.prompts[request_id]),
                sampling=Sampling(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos),
                seed=0,
                priority=priority,
                deadline_at_s=None if deadline_s is None else self.now_s + deadline_s * self.second_s,
                at_s=self.now_s,
            )
        )

    @precondition(lambda self: self.stages is not None and self.stages.in_flight)
    @rule(data=st.data(), compute_us=st.integers(0, 5000))
    def stages_answer_some_micro_batch(self, data: st.DataObject, compute_us: int) -> None:
        assert self.stages is not None
        index = data.draw(st.sampled_from(sorted(self.stages.in_flight)))
        self.handle(events.TokensArrived(tokens=self.stages.answer(index, compute_us=compute_us), at_s=self.now_s))

    @rule()
    def a_stale_answer_changes_nothing(self) -> None:
        timings = (StageTiming(0, 1),) * self.num_stages
        stale = Tokens(epoch=self.epoch + 1000, micro_batch=0, step=0, token_ids=(7,), timings=timings)
        assert self.machine.handle(events.TokensArrived(tokens=stale, at_s=self.now_s)) == []

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), by_stop_string=st.booleans())
    def a_request_is_ended_from_outside(self, data: st.DataObject, by_stop_string: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.prompts)))
        kind = events.StopStringFound if by_stop_string else events.Cancelled
        self.handle(kind(request_id=request_id, at_s=self.now_s))
        assert request_id in self.ended

    @rule(seconds=st.floats(0.0, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds * self.second_s
        self.handle(events.Tick(at_s=self.now_s))

    @invariant()
    def the_books_agree(self) -> None:
        if self.prompts or self.epoch:
            self.machine.check()

    @invariant()
    def every_token_follows_from_the_prompt(self) -> None:
        for request_id, tokens in self.tokens.items():
            if tokens and tokens[-1] != EOS:
                before = self.prompts[request_id] + tokens[:-1]
                assert tokens[-1] == next_token(before), "a token of somebody else"

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if self.is_up and set(self.prompts) != self.ended:
            assert self.stages is not None
            assert self.stages.in_flight, "requests are open and no step is in flight"

    def teardown(self) -> None:
        """Left alone, every request comes to its end: there is no deadlock, whatever happened before."""
        if not self.is_up or self.stages is None:
            return
        for _ in range(5000):
            if not self.stages.in_flight:
                break
            tokens = self.stages.answer(next(iter(self.stages.in_flight)))
            self.handle(events.TokensArrived(tokens=tokens, at_s=self.now_s))
            self.machine.check()
        assert not self.stages.in_flight, "steps go on when nobody is left"
        assert self.ended == set(self.prompts)
        assert not self.stages.sequences
        assert self.machine.statistics().used_blocks == 0


class QuickPipelineModel(PipelineModel):
    """So quick that several steps are taken at once."""

    second_s = 0.001


class RestlessPipelineModel(QuickPipelineModel):
    """With any number of micro-batches, and soon another."""

    def __init__(self) -> None:
        super().__init__()
        self.often = mock.patch.object(machine_module, "RETUNE_STEPS", 2)
        self.often.start()

    def begin_machine(self, micro_batches: int | None) -> Machine:
        machine = super().begin_machine(micro_batches)
        machine.tuner = RestlessTuner(self.num_stages, self.rng)
        return machine

    def teardown(self) -> None:
        self.often.stop()
        super().teardown()


class OneStageModel(PipelineModel):
    num_stages = 1


class BarrierModel(PipelineModel):
    schedule = Schedule.BARRIER


class StaticModel(PipelineModel):
    schedule = Schedule.STATIC


OPTIONS = {"stateful_step_count": 60, "deadline": None, "suppress_health_check": list(HealthCheck)}
PipelineModel.TestCase.settings = settings(max_examples=200, **OPTIONS)
QuickPipelineModel.TestCase.settings = settings(max_examples=200, **OPTIONS)
RestlessPipelineModel.TestCase.settings = settings(max_examples=200, **OPTIONS)
OneStageModel.TestCase.settings = settings(max_examples=200, **OPTIONS)
BarrierModel.TestCase.settings = settings(max_examples=50, **OPTIONS)
StaticModel.TestCase.settings = settings(max_examples=50, **OPTIONS)
TestContinuous = PipelineModel.TestCase
TestQuick = QuickPipelineModel.TestCase
TestRestless = RestlessPipelineModel.TestCase
TestOneStage = OneStageModel.TestCase
TestBarrier = BarrierModel.TestCase
TestStatic = StaticModel.TestCase


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ten_thousand_steps_under_pressure_lose_nothing(seed: int, num_stages: int) -> None:
    """Long runs with little memory: every request ends with exactly the tokens that follow from its prompt."""
    rng = random.Random(seed)
    machine = Machine(limits(num_stages=num_stages, micro_batches=1 if num_stages == 1 else None))
    stages = FakeStages(num_stages=num_stages, num_blocks=9, block_tokens=BLOCK_TOKENS, max_members=3)
    prompts: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    num_steps = 0

    def handle(event: events.Event) -> None:
        nonlocal num_steps
        for command in machine.handle(event):
            match command:
                case commands.IssueStep(step):
                    num_steps += 1
                    stages.take(step)
                case commands.EmitToken(request_id, index, token_id):
                    assert index == len(tokens[request_id])
                    assert token_id == next_token(prompts[request_id] + tokens[request_id])
                    tokens[request_id].append(token_id)
                case commands.FailRequest():
                    assert command.error.code is ErrorCode.BUSY
        machine.check()

    handle(events.PipelineReady(epoch=1, kv_blocks=9, at_s=0.0))
    now_s = 0.0
    while num_steps < 10_000:
        now_s += rng.random() * 0.001
        if rng.random() < 0.3:
            request_id = f"r{len(prompts)}"
            prompts[request_id], tokens[request_id] = [rng.randrange(3, 99) for _ in range(rng.randrange(1, 20))], []
            handle(
                events.Submitted(
                    request_id=request_id,
                    client="c",
                    prompt_token_ids=tuple(prompts[request_id]),
                    sampling=Sampling(max_new_tokens=rng.randrange(1, 20), ignore_eos=True),
                    seed=0,
                    priority=rng.randrange(-1, 2),
                    deadline_at_s=None,
                    at_s=now_s,
                )
            )
        elif rng.random() < 0.02 and prompts:
            handle(events.Cancelled(request_id=rng.choice(list(prompts)), at_s=now_s))
        elif stages.in_flight:
            answer = stages.answer(rng.choice(list(stages.in_flight)), compute_us=rng.randrange(100, 3000))
            handle(events.TokensArrived(tokens=answer, at_s=now_s))
    assert machine.statistics().preemptions > 10, "the memory was meant to be too little"
    assert stages.num_at_once > 1000
