"""How many micro-batches, and how well the pipeline is used."""

from __future__ import annotations

import pytest

from asyncpipe.wire.messages import MAX_STEPS_AT_ONCE, StageTiming
from asyncpipe_coordinator.core.efficiency import EfficiencyMeter
from asyncpipe_coordinator.core.tuning import Tuner

MS = 1000  # in microseconds


def tuned(stage_ms: list[float], *, overhead_ms: float, rows: tuple[int, ...] = (8,), per_row_ms: float = 0.0) -> Tuner:
    tuner = Tuner(len(stage_ms))
    for count in rows * 20:
        times_us = [int((ms + count * per_row_ms) * MS) for ms in stage_ms]
        round_trip_s = sum(times_us) / 1e6 + overhead_ms / 1e3
        tuner.observe(num_rows=count, timings=[StageTiming(0, us) for us in times_us], round_trip_s=round_trip_s)
    return tuner


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
    assert (tuner.steps_at_once(8), tuner.steps_at_once(8, holds_up=False)) == (9, 48)
    far_apart = tuned([1.5, 1.5], overhead_ms=50.0)
    assert (far_apart.steps_at_once(8), far_apart.steps_at_once(8, holds_up=False)) == (1, 3)
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
