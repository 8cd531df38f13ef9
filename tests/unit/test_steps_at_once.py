"""Several steps at once: of one stage, which goes on by itself, and of several, whose tokens go round the ring."""

from __future__ import annotations

from typing import Any

import pytest

from asyncpipe.errors import WireError
from asyncpipe.wire.messages import FinishReason, StageTiming, Step, Tokens
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.core.machine import Machine
from tests.core_machine import EOS, answer, machine, steps, submitted, tokens_of


def after_a_token(*, compute_us: int = 1000, at_s: float = 1.0, **options: Any) -> tuple[Machine, Step]:
    """A request for eight tokens has its first one, at `at_s`. With the step that follows."""
    core = machine(**({"num_stages": 1, "num_micro_batches": options.get("num_stages", 1)} | options))
    (step,) = steps(core.handle(submitted("a", max_new_tokens=8)))
    timings = (StageTiming(0, compute_us),) * core.limits.num_stages
    tokens = Tokens(epoch=1, micro_batch=0, step=step.step, token_ids=(21,), timings=timings)
    (following,) = steps(core.handle(events.TokensArrived(tokens=tokens, at_s=at_s)))
    core.check()
    return core, following


def test_one_stage_goes_on_with_its_own_tokens_until_somebody_has_all_of_them() -> None:
    core, step = after_a_token()
    assert (step.delta.token_ids, step.delta.num_steps) == ((21,), 7)
    leaving, *emitted, finished = answer(core, step, *range(22, 29))
    assert tokens_of(emitted) == [("a", index, 21 + index) for index in range(1, 8)]
    assert isinstance(finished, commands.FinishRequest)
    assert (finished.finish_reason, finished.num_completion_tokens) == (FinishReason.LENGTH, 8)
    (last,) = steps([leaving])
    assert (last.delta.left, last.delta.num_steps) == ((0,), 1)
    assert core.statistics().used_blocks == 0
    core.check()
    assert answer(core, last) == [], "nobody is left"


def test_what_was_computed_after_an_end_is_dropped() -> None:
    core, step = after_a_token()
    done = answer(core, step, 22, 23, EOS, 25, 26, 27, 28)
    assert tokens_of(done) == [("a", 1, 22), ("a", 2, 23), ("a", 3, EOS)]
    (finished,) = [command for command in done if isinstance(command, commands.FinishRequest)]
    assert (finished.finish_reason, finished.num_completion_tokens) == (FinishReason.STOP, 4)
    core.check()


def test_a_newcomers_prompt_goes_alone_and_then_all_go_on_until_the_first_has_all() -> None:
    core = machine(num_stages=1, num_micro_batches=1)
    (step,) = steps(core.handle(submitted("a", max_new_tokens=4)))
    core.handle(submitted("b", max_new_tokens=9))
    (joined,) = steps(answer(core, step, 21))
    assert (joined.delta.token_ids, len(joined.delta.opened), joined.delta.num_steps) == ((21,), 1, 1)
    (both,) = steps(answer(core, joined, 22, 31))
    assert (both.delta.token_ids, both.delta.num_steps) == ((22, 31), 2)
    done = answer(core, both, 23, 32, 24, 33)
    assert tokens_of(done) == [("a", 2, 23), ("b", 1, 32), ("a", 3, 24), ("b", 2, 33)]
    (alone,) = steps(done)
    assert (alone.delta.left, alone.delta.token_ids, alone.delta.num_steps) == ((0,), (33,), 6)


def test_the_tokens_of_a_lost_stages_steps_are_computed_again() -> None:
    core, step = after_a_token()
    core.handle(events.PipelineLost())
    assert answer(core, step, *range(22, 29)) == []
    (again,) = steps(core.handle(events.PipelineReady(epoch=2, kv_blocks=1000, at_s=0.0)))
    assert again.delta.opened[0].token_ids == (5, 5, 5, 21)
    assert tokens_of(answer(core, again, 22)) == [("a", 1, 22)]


def test_tokens_of_too_few_steps_break_the_protocol() -> None:
    core, step = after_a_token()
    with pytest.raises(WireError, match="6 tokens, where 7 were to come"):
        answer(core, step, *range(22, 28))


ONE_BY_ONE: list[dict[str, Any]] = [
    {"schedule": Schedule.STATIC},
    {"schedule": Schedule.BARRIER},
    {"compute_us": 30_000},
    {"num_stages": 2, "at_s": 1.0},  # they are far apart
    {"num_stages": 2, "at_s": 0.003, "is_ring": False},
]


@pytest.mark.parametrize("options", ONE_BY_ONE)
def test_steps_come_one_by_one_without_a_ring_in_batches_and_when_they_are_long(options: dict[str, Any]) -> None:
    _, step = after_a_token(**options)
    assert step.delta.num_steps == 1


def test_steps_come_one_by_one_when_there_are_no_blocks_for_more() -> None:
    core = machine(num_stages=1, num_micro_batches=1, kv_blocks=3)
    (step,) = steps(core.handle(submitted("a", max_new_tokens=8)))
    core.handle(submitted("b", max_new_tokens=8))
    (joined,) = steps(answer(core, step, 21))
    (both,) = steps(answer(core, joined, 22, 31))
    assert both.delta.num_steps == 1
    core.check()


# --- a ring of two stages, whose steps are long enough for their tokens to come one by one ---


def ring_after_a_token(*, compute_us: int = 6000, at_s: float = 0.013, num_steps: int = 4) -> tuple[Machine, Step]:
    """With the steps that follow; the second micro-batch rests."""
    core, step = after_a_token(num_stages=2, compute_us=compute_us, at_s=at_s)
    assert (step.delta.token_ids, step.delta.num_steps) == ((21,), num_steps)
    return core, step


def test_each_token_of_a_ring_comes_by_itself_and_the_coordinator_is_asked_after_the_last() -> None:
    core, step = ring_after_a_token()
    assert not step.is_gathered
    for number in range(3):
        assert tokens_of(done := answer(core, step, 22 + number, number=number)) == [("a", 1 + number, 22 + number)]
        assert not steps(done)
        core.check()
    done = answer(core, step, 25, number=3)
    (following,) = steps(done)
    assert (following.step, following.delta.token_ids) == (step.step + 4, (25,))
    assert tokens_of(done) == [("a", 4, 25)]
    core.check()


def test_a_newcomer_takes_the_micro_batch_that_rests() -> None:
    core, step = ring_after_a_token()
    (other,) = steps(core.handle(submitted("b", max_new_tokens=5)))
    assert (step.micro_batch, other.micro_batch) == (0, 1)
    (going_on,) = steps(answer(core, other, 31, at_s=0.004))
    assert (going_on.micro_batch, going_on.delta.token_ids) == (1, (31,)), "the other one's steps are not waited for"


def test_steps_come_one_by_one_while_the_last_prompt_is_at_its_end_for_then_who_is_where_may_change() -> None:
    core = machine(num_stages=2, num_micro_batches=None, shares_memory=True)
    (first,) = steps(core.handle(submitted("a", max_new_tokens=8)))
    (second,) = steps(core.handle(submitted("b", max_new_tokens=8)))
    (beside_a_prompt,) = steps(answer(core, first, 21, at_s=0.003))
    assert (beside_a_prompt.micro_batch, beside_a_prompt.delta.num_steps) == (0, 1)
    (going_on,) = steps(answer(core, second, 31, at_s=0.003))
    assert going_on.micro_batch == 1
    assert going_on.delta.num_steps > 1


@pytest.mark.parametrize("by_its_client", [True, False])
def test_who_ends_is_computed_to_the_last_of_the_steps_and_keeps_its_blocks_until_then(by_its_client: bool) -> None:
    core, step = ring_after_a_token()
    if by_its_client:
        answer(core, step, 22)
        (finished,) = core.handle(events.Cancelled(request_id="a", at_s=1.0))
    else:
        (token, finished) = answer(core, step, EOS)
        assert isinstance(token, commands.EmitToken)
    assert isinstance(finished, commands.FinishRequest)
    (other,) = steps(core.handle(submitted("b")))
    assert other.delta.left == (), "it would come between the steps"
    assert core.statistics().used_blocks == 2 + 1
    for number in range(1, 3):
        assert answer(core, step, 99, number=number) == []
        core.check()
    (leaving,) = steps(answer(core, step, 99, number=3))
    assert leaving.delta.left == (0,)
    assert core.statistics().used_blocks == 1
    core.check()


def test_a_ring_that_is_lost_between_two_steps_goes_on_from_the_token_that_came() -> None:
    core, step = ring_after_a_token()
    answer(core, step, 22)
    core.handle(events.PipelineLost())
    assert answer(core, step, 23, number=1) == []
    (again,) = steps(core.handle(events.PipelineReady(epoch=2, kv_blocks=1000, at_s=0.0)))
    assert again.delta.opened[0].token_ids == (5, 5, 5, 21, 22)


def test_tokens_of_a_ring_come_in_order_and_for_one_step() -> None:
    core, step = ring_after_a_token()
    with pytest.raises(WireError, match="not in flight"):
        answer(core, step, 23, number=1)
    with pytest.raises(WireError, match="2 tokens, where 1 were to come"):
        answer(core, step, 22, 23)


def test_a_ring_is_awaited_from_its_last_tokens_on() -> None:
    core, step = ring_after_a_token()
    answer(core, step, 22, at_s=50.0)
    assert core.step_awaited_since(49.0) is None
    assert core.step_awaited_since(51.0) == step


# --- a ring whose steps are so short that their tokens come together ---


def short_ring_after_a_token() -> tuple[Machine, Step]:
    core, step = ring_after_a_token(compute_us=1000, at_s=0.003, num_steps=7)
    assert step.is_gathered
    return core, step


def test_the_tokens_of_short_steps_come_together_after_the_last() -> None:
    core, step = short_ring_after_a_token()
    done = answer(core, step, *range(22, 29))
    assert tokens_of(done) == [("a", index, 21 + index) for index in range(1, 8)]
    (last,) = steps(done)
    assert (last.step, last.delta.left, last.delta.num_steps, last.is_gathered) == (step.step + 7, (0,), 1, False)
    core.check()


def test_of_gathered_tokens_none_may_lack_and_none_comes_before() -> None:
    core, step = short_ring_after_a_token()
    with pytest.raises(WireError, match="1 tokens, where 7 were to come"):
        answer(core, step, 22)
    with pytest.raises(WireError, match="not in flight"):
        answer(core, step, *range(22, 29), number=6)


def test_what_gathered_steps_take_is_what_single_ones_do() -> None:
    core, step = short_ring_after_a_token()
    timings = (StageTiming(70, 7000), StageTiming(0, 14_000))
    tokens = Tokens(epoch=1, micro_batch=0, step=step.step, token_ids=tuple(range(22, 29)), timings=timings)
    before = core.meter.num_steps
    core.handle(events.TokensArrived(tokens=tokens, at_s=0.003 + 0.02807))
    assert core.meter.num_steps == before + 7
    assert core.meter.busy_s == pytest.approx([0.001 + 0.007, 0.001 + 0.014])
    assert core.tuner.overhead_s == pytest.approx(0.001)
    assert core.tuner.round_trip_s == pytest.approx((0.003 * 0.97 + 0.02807 / 7) / 1.97)


def test_a_ring_that_is_lost_before_its_tokens_came_computes_them_again() -> None:
    core, step = short_ring_after_a_token()
    core.handle(events.PipelineLost())
    assert answer(core, step, *range(22, 29)) == []
    (again,) = steps(core.handle(events.PipelineReady(epoch=2, kv_blocks=1000, at_s=0.0)))
    assert again.delta.opened[0].token_ids == (5, 5, 5, 21)
