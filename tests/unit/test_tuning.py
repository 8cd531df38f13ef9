"""How many micro-batches, and how well the pipeline is used."""

from __future__ import annotations

import pytest

from asyncpipe.wire.messages import MAX_STEPS_AT_ONCE, StageTiming
from asyncpipe_coordinator.core.efficiency import EfficiencyMeter
from asyncpipe_coordinator.core.trials import ENOUGH, NUM_RECENT, STALE
from asyncpipe_coordinator.core.tuning import Tuner

MS = 1000  # in microseconds


def tuned(stage_ms: list[float], *, overhead_ms: float, rows: tuple[int, ...] = (8,), per_row_ms: float = 0.0) -> Tuner:
    tuner = Tuner(len(stage_ms))
    measure(tuner, stage_ms, overhead_ms=overhead_ms, rows=rows, per_row_ms=per_row_ms)
    return tuner


def measure(
    tuner: Tuner, stage_ms: list[float], *, overhead_ms: float, rows: tuple[int, ...] = (8,), per_row_ms: float = 0.0
) -> None:
    for count in rows * 20:
        times_us = [int((ms + count * per_row_ms) * MS) for ms in stage_ms]
        round_trip_s = sum(times_us) / 1e6 + overhead_ms / 1e3
        tuner.observe(num_rows=count, timings=[StageTiming(0, us) for us in times_us], round_trip_s=round_trip_s)


@pytest.mark.parametrize(
    ("num_stages", "overhead_ms", "expected"),
    [(2, 0.0, 4), (2, 1.0, 5), (4, 1.0, 7), (4, 9.0, 8), (2, 20.0, 7), (8, 40.0, 16)],
)
def test_there_are_enough_micro_batches_to_hide_links_when_sequences_abound(
    num_stages: int, overhead_ms: float, expected: int
) -> None:
    tuner = tuned([10.0] * num_stages, overhead_ms=overhead_ms)
    assert tuner.best(num_sequences=10_000, max_sequences=8, most=64) == expected


def test_a_few_more_are_opened_only_for_sequences_that_would_wait() -> None:
    tuner = tuned([10.0] * 4, overhead_ms=1.0)  # five fill the pipeline
    assert [tuner.best(num_sequences=count, max_sequences=8, most=64) for count in (40, 41, 48, 49, 100)] == [5, 6, 6, 7, 7]


def test_few_sequences_are_not_cut_into_more_micro_batches_than_pay() -> None:
    """16 sequences in 2 steps of 10 ms come back every 21 ms, in 3 steps every 30 ms."""
    assert tuned([10.0, 10.0], overhead_ms=1.0).best(num_sequences=16, max_sequences=32, most=64) == 2


def test_when_the_time_is_all_the_sequences_smaller_micro_batches_cost_nothing() -> None:
    tuner = tuned([0.01, 0.01], overhead_ms=2.0, rows=(4, 8, 16), per_row_ms=1.0)
    assert tuner.best(num_sequences=16, max_sequences=32, most=64) > 2


def test_one_stage_takes_as_many_steps_at_once_as_fit_into_the_time_that_others_may_wait() -> None:
    tuner = tuned([2.0], overhead_ms=1.0, rows=(4, 8), per_row_ms=0.9)
    assert [tuner.steps_at_once(rows) for rows in (2, 8, 30, 100)] == [10, 4, 1, 1]
    assert tuned([0.001], overhead_ms=1.0).steps_at_once(8) == MAX_STEPS_AT_ONCE
    assert Tuner(1).steps_at_once(8) == 1


def test_several_stages_count_their_links_and_take_more_where_nobody_is_held_up() -> None:
    tuner = tuned([1.5, 1.5], overhead_ms=1.1)
    assert (tuner.steps_at_once(8), tuner.steps_at_once(8, holds_up=False)) == (9, 9)
    far_apart = tuned([1.5, 1.5], overhead_ms=50.0)
    assert (far_apart.steps_at_once(8), far_apart.steps_at_once(8, holds_up=False)) == (1, 3)
    far = tuned([1.5, 1.5], overhead_ms=20.0)
    assert (far.steps_at_once(8), far.steps_at_once(8, holds_up=False)) == (1, 4)
    alone = tuned([3.1], overhead_ms=1.0)
    assert alone.steps_at_once(8) == alone.steps_at_once(8, holds_up=False) == 12, "its tokens come in jerks"


def test_steps_at_once_are_measured_one_by_one() -> None:
    tuner = tuned([2.1], overhead_ms=1.0)
    timing = StageTiming(0, 21 * MS)
    tuner.observe(num_rows=8, timings=[timing], round_trip_s=0.022, num_steps=10)
    assert tuner.steps_at_once(8) == 19
    assert tuner.overhead_s == pytest.approx(0.001)


def test_short_steps_at_once_need_no_second_micro_batch_to_hide_the_way_between_them() -> None:
    short = tuned([2.0], overhead_ms=2.0, rows=(4, 8), per_row_ms=0.5)
    long = tuned([2.0], overhead_ms=30.0, rows=(4, 8), per_row_ms=5.0)
    assert short.best(num_sequences=8, max_sequences=8, most=8) == 1
    assert long.best(num_sequences=8, max_sequences=8, most=8) > 1


def round_trips(tuner: Tuner, num_micro_batches: int, *times_ms: float, num_sequences: int = 8) -> None:
    """Of one micro-batch, the others beside it; before that, one that comes when nobody was there."""
    at_s = 0.0
    for ms in (0.0, *times_ms):
        issued_at_s, at_s = at_s, at_s + ms / 1e3
        tuner.observe_decoding(
            num_micro_batches=num_micro_batches, num_sequences=num_sequences, issued_at_s=issued_at_s, at_s=at_s
        )


def chosen(tuner: Tuner, *, num_sequences: int = 8, **options: bool) -> int:
    return tuner.best(num_sequences=num_sequences, max_sequences=32, most=12, **({"may_try": True} | options))


@pytest.mark.parametrize(("in_turns_ms", "expected"), [(12, 1), (18.9, 1), (19.1, 2), (30, 2)])
def test_stages_take_turns_where_a_short_trial_has_shown_that_it_is_quicker(in_turns_ms: float, expected: int) -> None:
    tuner = tuned([10.0, 10.0], overhead_ms=1.0)
    round_trips(tuner, 2, *[20.0] * (ENOUGH - 1))
    assert chosen(tuner) == 2
    round_trips(tuner, 2, 500.0)
    assert chosen(tuner) == 1, "it is tried"
    round_trips(tuner, 1, 500.0, *[in_turns_ms] * (ENOUGH - 1))
    assert chosen(tuner) == expected
    assert chosen(tuner, may_try=False) == 2
    assert chosen(tuner, num_sequences=33) == 2, "they do not fit into one micro-batch"
    assert chosen(tuner, num_sequences=16) == 2, "of so many nothing is known"


@pytest.mark.parametrize(("times_ms", "expected"), [((20, 12, 19), 2), ((20, 21, 12), 1), ((20, 19.5, 19.5), 3)])
def test_more_micro_batches_than_stages_are_tried_against_fewer(times_ms: tuple[float, ...], expected: int) -> None:
    """Three were to hide links and coordinator, which they may hold up themselves."""
    tuner = tuned([3.0, 3.0], overhead_ms=5.0, rows=(4, 8), per_row_ms=0.4)
    for count, ms in zip((3, 2, 1), times_ms, strict=True):
        assert chosen(tuner, num_sequences=16) == count
        round_trips(tuner, count, *[ms] * ENOUGH, num_sequences=16)
    assert chosen(tuner, num_sequences=16) == expected


def test_of_two_sequences_there_are_no_three_micro_batches_to_wait_for() -> None:
    tuner = tuned([3.0] * 4, overhead_ms=1.0)
    assert chosen(tuner, num_sequences=2) == 4
    round_trips(tuner, 2, *[14.0] * ENOUGH, num_sequences=2)
    assert chosen(tuner, num_sequences=2) == 1
    round_trips(tuner, 1, *[13.9] * ENOUGH, num_sequences=2)
    assert chosen(tuner, num_sequences=2) == 4


def test_turns_are_judged_by_the_work_of_as_many_sequences() -> None:
    """15 in two micro-batches come back as soon as 9 in one; a step of 9 takes 7 times 9 ms, of 15 it takes 7 times 15."""
    tuner = tuned([0.01, 0.01], overhead_ms=0.0, rows=(8, 16), per_row_ms=1.0)
    round_trips(tuner, 2, *[20.0] * ENOUGH, num_sequences=15)
    round_trips(tuner, 1, *[18.0] * ENOUGH, num_sequences=9)
    assert chosen(tuner, num_sequences=9) == 2


def test_round_trips_of_different_times_are_judged_by_one_measure() -> None:
    """What is known of the stages' times changes. That does not make the round trips longer that are measured after it."""
    tuner = tuned([10.0, 10.0], overhead_ms=1.0)
    round_trips(tuner, 2, *[20.0] * ENOUGH)
    round_trips(tuner, 1, *[16.0] * ENOUGH)
    assert chosen(tuner) == 1
    measure(tuner, [5.0, 5.0], overhead_ms=1.0, rows=(8, 8))
    round_trips(tuner, 1, *[16.0] * NUM_RECENT)
    assert chosen(tuner) == 1


def test_turns_are_not_tried_where_a_trial_would_take_long() -> None:
    tuner = tuned([1000.0, 1000.0], overhead_ms=1.0)
    round_trips(tuner, 2, *[2000.0] * ENOUGH)
    assert chosen(tuner) == 2


@pytest.mark.parametrize(("way", "other"), [(2, 1), (1, 2)])
def test_what_has_not_been_measured_for_long_is_measured_again(way: int, other: int) -> None:
    tuner = tuned([10.0, 10.0], overhead_ms=1.0)
    ms = {way: 15.0, other: 20.0}
    round_trips(tuner, other, *[ms[other]] * ENOUGH)
    round_trips(tuner, way, *[ms[way]] * (STALE - 1))
    assert chosen(tuner) == way
    round_trips(tuner, way, ms[way])
    assert chosen(tuner) == other


def test_a_step_without_others_beside_it_does_not_say_how_long_one_takes_beside_them() -> None:
    tuner = tuned([10.0, 10.0], overhead_ms=10.0)
    before = tuner.steps_at_once(8, holds_up=False)
    timings = [StageTiming(0, MS), StageTiming(0, MS)]
    for _ in range(50):
        tuner.observe(num_rows=8, timings=timings, round_trip_s=0.012, in_turns=True)
    assert tuner.steps_at_once(8, holds_up=False) == before


def test_the_first_step_says_something_even_without_others_beside_it() -> None:
    tuner = Tuner(2)
    tuner.observe(num_rows=8, timings=[StageTiming(0, 2 * MS)] * 2, round_trip_s=0.004, in_turns=True)
    assert tuner.steps_at_once(8) == 10


def measured(num_stages: int, times_ms: dict[int, float], *, overhead_ms: float = 0.0) -> Tuner:
    """By decode steps of one row, and parts of prompts of more, on stages that are all alike. First times are slow."""
    tuner = Tuner(num_stages)
    for rows, ms in times_ms.items():
        for time_ms in (1000 * ms, ms, ms):
            timings = [StageTiming(0, int(time_ms * MS))] * num_stages
            inside_s = sum(timing.compute_us for timing in timings) / 1e6
            tuner.observe(num_rows=rows, timings=timings, round_trip_s=inside_s + overhead_ms / 1e3, has_prompts=rows > 1)
    return tuner


@pytest.mark.parametrize(
    ("num_stages", "weights_ms", "per_token_ms", "overhead_ms", "expected"),
    [
        (1, 4, 0.5, 0, 400),
        (2, 4, 0.5, 0, 64),  # (400 / 64 + 1) times 4 + 32 ms, where whole they take 2 times 4 + 200
        (4, 4, 0.5, 0, 32),
        (4, 40, 0.5, 0, 128),
        (4, 40, 0.01, 0, 400),
        (2, 4, 0.5, 100, 256),
    ],
)
def test_prompts_go_in_parts_that_overlap_as_far_as_weights_are_not_read_too_often(
    num_stages: int, weights_ms: float, per_token_ms: float, overhead_ms: float, expected: int
) -> None:
    times_ms = {rows: weights_ms + rows * per_token_ms for rows in (1, 100)}
    assert measured(num_stages, times_ms, overhead_ms=overhead_ms).part(400, most=512) == expected


def test_what_small_parts_took_decides_about_them() -> None:
    assert measured(2, {1: 5, 128: 47}).part(128, most=512) == 64
    assert measured(2, {1: 5, 64: 33, 128: 47}).part(128, most=512) == 128
    assert measured(2, {1: 5, 64: 33, 128: 47, 512: 220}).part(1024, most=512) == 128


def test_prompts_are_not_cut_before_both_kinds_of_steps_were_measured() -> None:
    for tuner in (Tuner(2), measured(2, {1: 5}), measured(2, {100: 50})):
        assert [tuner.part(count, most=512) for count in (20, 400, 2000)] == [20, 400, 512]


def test_before_any_measurement_there_is_one_a_stage_within_the_bound() -> None:
    assert Tuner(4).best(num_sequences=100, max_sequences=8, most=20) == 4
    assert Tuner(4).best(num_sequences=100, max_sequences=8, most=3) == 3


def test_a_full_pipeline_has_efficiency_one() -> None:
    meter = EfficiencyMeter(2)
    meter.issued(0.0)
    for step in range(10):
        meter.returned([0.5, 0.5], at_s=1.0 + step * 0.5)
    assert meter.ideal_s == pytest.approx(meter.measured_s) == pytest.approx(5.5)
    assert meter.efficiency == pytest.approx(1.0)
    assert meter.bubble == pytest.approx(1 - 10 / 11)


def test_one_micro_batch_on_two_stages_has_efficiency_one_half() -> None:
    meter = EfficiencyMeter(2)
    for step in range(100):
        meter.issued(step * 1.0)
        meter.returned([0.5, 0.5], at_s=1.0 + step)
    assert meter.efficiency == pytest.approx(0.505)
    assert meter.bubble == pytest.approx(0.5)


def test_the_slowest_stage_sets_the_ideal() -> None:
    meter = EfficiencyMeter(3)
    meter.issued(0.0)
    for _ in range(4):
        meter.returned([1.0, 2.0, 1.0], at_s=20.0)
    assert meter.ideal_s == pytest.approx(1.0 + 4 * 2.0 + 1.0)


def test_time_without_work_does_not_count() -> None:
    meter = EfficiencyMeter(1)
    for start_s in (0.0, 100.0):
        meter.issued(start_s)
        meter.returned([1.0], at_s=start_s + 1.25)
        meter.emptied()
    assert (meter.ideal_s, meter.measured_s) == (2.0, 2.5)
    assert meter.efficiency == pytest.approx(0.8)
