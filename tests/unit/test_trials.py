"""Stages that share a memory take turns while that is quicker, until somebody comes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from asyncpipe.wire.messages import Step
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.trials import ENOUGH, NUM_RECENT, Trials
from tests.core_machine import machine, submitted
from tests.fake_stages import FakeStages

STEP_MS = 10.0  # of a stage while the other one rests
ROUNDS = 4 * (NUM_RECENT + ENOUGH)


@dataclass
class Pipeline:
    """Of two stages, a step at a time. Beside another each takes `slower` times as long, however few sequences it has."""

    slower: float
    shares_memory: bool = True
    num_micro_batches: int | None = None
    now_s: float = 0.0
    issued: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = FakeStages(num_stages=2, num_blocks=1000, block_tokens=32, max_members=8)
        self.core = machine(
            is_ring=False,
            shares_memory=self.shares_memory,
            num_micro_batches=self.num_micro_batches,
            kv_block_tokens=32,
            eos_token_ids=frozenset(),
        )
        for number in range(4):
            self.submit(f"r{number}")

    def submit(self, name: str) -> None:
        self.handle(submitted(name, max_new_tokens=4000))

    def handle(self, event: events.Event) -> None:
        for command in self.core.handle(event):
            if isinstance(command, commands.IssueStep):
                self.stages.take(command.step)
                self.issued.append(command.step)
        self.core.check()

    def go_on(self, rounds: int) -> set[int]:
        """The numbers of micro-batches that were at work meanwhile."""
        seen = set()
        for _ in range(rounds):
            flying = list(self.stages.in_flight)
            step_ms = STEP_MS * (self.slower if len(flying) > 1 else 1.0)
            seen.add(len(flying))
            for index in flying:  # every stage is busy with one of them, or the only one goes through both
                self.now_s += 2 * step_ms / len(flying) / 1000
                tokens = self.stages.answer(index, compute_us=int(step_ms * 1000))
                self.handle(events.TokensArrived(tokens=tokens, at_s=self.now_s))
        return seen

    @property
    def num_open(self) -> int:
        return self.core.statistics().num_micro_batches


def test_one_micro_batch_has_all_sequences_while_each_stage_is_quicker_alone() -> None:
    pipeline = Pipeline(slower=1.5)
    pipeline.go_on(ROUNDS)
    assert pipeline.go_on(ROUNDS) == {1}
    assert pipeline.issued[-1].delta.num_rows == 4


def test_there_is_one_a_stage_after_a_trial_where_they_do_not_slow_each_other_down() -> None:
    pipeline = Pipeline(slower=1.0)
    assert pipeline.go_on(ROUNDS) == {1, 2}
    assert pipeline.go_on(ROUNDS) == {2}


@pytest.mark.parametrize("options", [{"shares_memory": False}, {"num_micro_batches": 2}])
def test_nothing_is_tried_where_it_cannot_help_or_is_not_wanted(options: dict[str, bool | int]) -> None:
    pipeline = Pipeline(slower=1.5, **options)  # type: ignore[arg-type]
    assert pipeline.go_on(2 * ROUNDS) == {2}


def test_a_newcomers_prompt_does_not_wait_for_the_turn_of_others() -> None:
    pipeline = Pipeline(slower=1.5)
    pipeline.go_on(2 * ROUNDS)
    assert pipeline.num_open == 1
    before = len(pipeline.issued)
    pipeline.submit("newcomer")
    assert pipeline.num_open == 2
    (step,) = pipeline.issued[before:]
    assert [opened.token_ids for opened in step.delta.opened] == [(5, 5, 5)]
    assert pipeline.go_on(ROUNDS) == {1, 2}
    assert pipeline.num_open == 1
    assert pipeline.issued[-1].delta.num_rows == 5


def test_steps_whose_tokens_come_together_are_as_many_round_trips() -> None:
    trials, now_s = Trials(), 0.0

    def observe(num_micro_batches: int, *, seconds: float, num_steps: int, times: int) -> None:
        nonlocal now_s
        for _ in range(times):
            trials.observe(
                num_micro_batches=num_micro_batches,
                num_sequences=4,
                issued_at_s=now_s,
                at_s=now_s + seconds,
                num_steps=num_steps,
            )
            now_s += seconds

    def best() -> int:
        return trials.best([2, 1], num_sequences=4, steps_s=lambda _: 0.01)

    observe(2, seconds=0.02, num_steps=1, times=ENOUGH)
    assert best() == 2, "one more is needed"
    observe(2, seconds=0.02, num_steps=1, times=1)
    assert best() == 1, "it is tried"
    observe(1, seconds=0.064, num_steps=4, times=1 + ENOUGH // 4)  # the first is of another load, and does not count
    assert best() == 1, "16 ms are less than 20"
