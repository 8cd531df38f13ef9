"""Single decisions of the scheduling core."""

from __future__ import annotations

import dataclasses

import pytest

from asyncpipe.errors import Invalid, StageLost, WireError, to_data
from asyncpipe.wire.messages import FinishReason, StageTiming, Step, TokenLogprobs, Tokens
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.core.partition import LayerRange, split_layers
from asyncpipe_coordinator.core.sequences import Sequence, SequenceState
from tests.core_machine import EOS, answer, machine, step_of, steps, submitted, tokens_of


def test_a_micro_batch_is_issued_again_without_waiting_for_the_others() -> None:
    core = machine()
    (first,) = steps(core.handle(submitted("a")))
    (second,) = steps(core.handle(submitted("b")))
    assert {first.micro_batch, second.micro_batch} == {0, 1}
    (again,) = steps(answer(core, first, 9))
    assert (again.micro_batch, again.step, again.delta.token_ids) == (0, 1, (9,))


def test_the_stages_get_the_next_step_before_clients_get_the_tokens() -> None:
    core = machine()
    (step,) = steps(core.handle(submitted("a")))
    assert [type(command) for command in answer(core, step, 9)] == [commands.IssueStep, commands.EmitToken]


def test_a_step_is_alone_while_no_other_is_in_the_pipeline_or_about_to_be() -> None:
    core = machine()
    (alone,) = steps(core.handle(submitted("a")))
    assert alone.is_alone
    (going_on,) = steps(answer(core, alone, 9))
    assert going_on.is_alone
    (beside,) = steps(core.handle(submitted("b", max_new_tokens=1)))
    assert not beside.is_alone
    (in_company,) = steps(answer(core, going_on, 9))
    assert not in_company.is_alone
    (leaving,) = steps(answer(core, beside, 9))
    answer(core, leaving)
    (alone_again,) = steps(answer(core, in_company, 9))
    assert alone_again.is_alone


def test_parts_of_a_prompt_that_overlap_are_not_alone() -> None:
    issued = steps(machine().handle(submitted("long", prompt_len=2000)))
    assert [step.is_alone for step in issued] == [False, False]


def test_nobody_else_rests_where_there_is_one_stage() -> None:
    core = machine(num_stages=1, num_micro_batches=1)
    assert [step.is_alone for step in steps(core.handle(submitted("a")))] == [False]


def test_requests_are_spread_evenly_over_micro_batches() -> None:
    core = Machine(machine().limits)
    for number in range(6):
        core.handle(submitted(f"r{number}"))
    issued = steps(core.handle(events.PipelineReady(epoch=1, kv_blocks=1000, at_s=0.0)))
    assert [len(step.delta.opened) for step in issued] == [3, 3]


def test_members_move_to_a_micro_batch_that_has_lost_some() -> None:
    core = Machine(machine().limits)
    for number in range(6):
        core.handle(submitted(f"r{number}", max_new_tokens=100))
    first, second = steps(core.handle(events.PipelineReady(epoch=1, kv_blocks=1000, at_s=0.0)))
    first = step_of(answer(core, first, EOS, EOS, 9), 0)
    second = step_of(answer(core, second, 9, 9, 9), 1)
    (moved,) = second.delta.parted
    assert step_of(answer(core, first, 8), 0).delta.adopted == (moved,)


def test_a_long_prompt_is_computed_in_chunks_through_all_micro_batches_at_once() -> None:
    core = machine()
    issued = steps(core.handle(submitted("long", prompt_len=2000)))
    assert [(step.micro_batch, step.delta.chunks[0].count) for step in issued] == [(0, 512), (1, 512)]


def test_a_prompt_that_comes_while_nobody_decodes_is_computed_in_parts_that_overlap() -> None:
    core = machine()
    for rows, compute_us in (*[(1, 4_500)] * 2, *[(100, 54_000)] * 2):
        timings = [StageTiming(0, compute_us)] * 2
        core.tuner.observe(num_rows=rows, timings=timings, round_trip_s=0.0, has_prompts=rows > 1)
    count = core.tuner.part(500, most=512)
    assert count == 128
    issued = steps(core.handle(submitted("a", prompt_len=500)))
    parts = []
    while issued:
        step = issued.pop(0)
        parts += [chunk.count for chunk in step.delta.chunks]
        issued += steps(answer(core, step, *[9] * (sum(parts) == 500), at_s=0.0))
    assert parts[:2] == [count, count], "one for each stage"
    assert min(parts[:-1]) == count, "and not ever smaller ones"


def test_a_short_prompt_overtakes_a_long_one_and_the_long_one_goes_on() -> None:
    core = machine()
    first, _ = steps(core.handle(submitted("long", prompt_len=2000)))
    assert not steps(core.handle(submitted("short", prompt_len=10)))
    chunks = step_of(answer(core, first), 0).delta.chunks
    assert [chunk.count for chunk in chunks] == [502, 10]


def test_decoding_goes_on_while_a_long_prompt_is_computed_a_part_at_a_time() -> None:
    core = machine(num_micro_batches=1, kv_blocks=100_000)
    (step,) = steps(core.handle(submitted("a", max_new_tokens=100)))
    core.handle(submitted("long", prompt_len=2000))
    (step,) = steps(answer(core, step, 9))
    assert step.delta.token_ids == (9,)
    counts = []
    while step.delta.chunks:
        counts += [chunk.count for chunk in step.delta.chunks]
        (step,) = steps(answer(core, step, *(9 for _ in range(len(counts) // 8 + 1))))
    assert counts == [250] * 8  # an eighth of what waited in each step, to the end


def test_prompts_that_come_later_are_computed_at_their_own_rate() -> None:
    core = machine(num_micro_batches=1, kv_blocks=100_000)
    (step,) = steps(core.handle(submitted("a", max_new_tokens=100)))
    core.handle(submitted("long", prompt_len=2000, max_new_tokens=1))
    (step,) = steps(answer(core, step, 9))
    for _ in range(7):
        (step,) = steps(answer(core, step, 9))
    (step,) = steps(answer(core, step, 9, 9))
    assert not step.delta.chunks
    core.handle(submitted("later", prompt_len=400))
    (step,) = steps(answer(core, step, 9))
    assert [chunk.count for chunk in step.delta.chunks] == [50]


def test_the_least_important_member_gives_its_blocks_up_and_comes_back() -> None:
    core = machine(num_micro_batches=1, kv_blocks=4, max_context_len=17)
    (step,) = steps(core.handle(submitted("old", prompt_len=7, max_new_tokens=9)))
    core.handle(submitted("young", prompt_len=7, max_new_tokens=9))
    (step,) = steps(answer(core, step, 9))
    (step,) = steps(answer(core, step, 9, 9))
    assert (step.delta.left, len(step.delta.token_ids)) == ((1,), 1)
    assert core.statistics().preemptions == 1
    while not step.delta.opened:
        (step,) = steps(answer(core, step, 9))
    (again,) = step.delta.opened
    assert (again.num_prompt, again.token_ids) == (7, (5,) * 7 + (9,))


def test_a_request_of_higher_priority_begins_first() -> None:
    core = machine(num_micro_batches=1, max_sequences_per_micro_batch=1)
    (step,) = steps(core.handle(submitted("running", max_new_tokens=1)))
    core.handle(submitted("later"))
    core.handle(submitted("urgent", prompt_len=7, priority=1))
    (step,) = steps(answer(core, step, 9))
    assert len(step.delta.opened[0].token_ids) == 7


def test_the_end_of_sequence_token_ends_a_request_unless_ignored() -> None:
    for ignore_eos, finishes in ((False, True), (True, False)):
        core = machine()
        (step,) = steps(core.handle(submitted("a", ignore_eos=ignore_eos)))
        done = answer(core, step, EOS)
        assert any(isinstance(command, commands.FinishRequest) for command in done) is finishes


def test_a_stop_token_ends_a_request_once_it_has_its_least_tokens() -> None:
    core = machine()
    (step,) = steps(core.handle(submitted("a", max_new_tokens=9, stop_token_ids=(7,), min_tokens=2)))
    done = answer(core, step, 7)
    assert not any(isinstance(command, commands.FinishRequest) for command in done)
    done = answer(core, step_of(done, step.micro_batch), 7)
    assert [c.finish_reason for c in done if isinstance(c, commands.FinishRequest)] == [FinishReason.STOP]


def test_a_finished_sequence_leaves_in_the_next_delta_and_its_neighbour_goes_on() -> None:
    core = machine(num_micro_batches=1)
    (step,) = steps(core.handle(submitted("a")))
    core.handle(submitted("b"))
    (step,) = steps(answer(core, step, 9))
    assert (step.delta.token_ids, len(step.delta.opened)) == ((9,), 1)
    (step,) = steps(answer(core, step, EOS, 8))
    assert (step.delta.left, step.delta.token_ids) == ((0,), (8,))


def test_the_last_step_of_an_empty_micro_batch_only_lets_sequences_leave() -> None:
    core = machine()
    (step,) = steps(core.handle(submitted("a", max_new_tokens=1)))
    done = answer(core, step, 9)
    (finish,) = [command for command in done if isinstance(command, commands.FinishRequest)]
    assert (finish.finish_reason, finish.num_completion_tokens) == (FinishReason.LENGTH, 1)
    (last,) = steps(done)
    assert (last.delta.left, last.delta.num_rows) == ((0,), 0)
    assert answer(core, last) == []


def test_a_full_queue_refuses_with_a_hint() -> None:
    core = machine(num_micro_batches=1, max_sequences_per_micro_batch=1, max_waiting=1)
    core.handle(submitted("a"))
    core.handle(submitted("b"))
    (refused,) = core.handle(submitted("c"))
    assert isinstance(refused, commands.FailRequest)
    assert (refused.error.code.value, refused.error.retry_after_s > 0) == ("busy", True)


def test_the_end_of_the_context_ends_a_request() -> None:
    core = machine(max_context_len=32)
    (step,) = steps(core.handle(submitted("a", prompt_len=31, max_new_tokens=50)))
    reasons = [c.finish_reason for c in answer(core, step, 9) if isinstance(c, commands.FinishRequest)]
    assert reasons == [FinishReason.LENGTH]


def test_a_lost_pipelines_sequences_are_computed_from_prompt_and_tokens_by_the_next() -> None:
    """In their old order, under new numbers; the clients' tokens go on without a gap."""
    core = machine(num_micro_batches=1)
    (step,) = steps(core.handle(submitted("a")))
    core.handle(submitted("b"))
    (step,) = steps(answer(core, step, 21))
    assert core.handle(events.PipelineLost()) == []
    assert answer(core, step, 22, 31) == [], "of the epoch before"
    core.check()
    (step,) = steps(core.handle(events.PipelineReady(epoch=2, kv_blocks=1000, at_s=0.0)))
    opened = step.delta.opened
    assert [(one.token_ids, one.num_prompt) for one in opened] == [((5, 5, 5, 21), 3), ((5, 5, 5), 3)]
    assert {one.sequence for one in opened}.isdisjoint({0, 1})
    assert tokens_of(answer(core, step, 22, 31)) == [("a", 1, 22), ("b", 0, 31)]


def test_requests_that_come_while_there_is_no_pipeline_wait_for_the_next() -> None:
    core = machine()
    core.handle(events.PipelineLost())
    assert core.handle(submitted("a")) == []
    assert steps(core.handle(events.PipelineReady(epoch=2, kv_blocks=1000, at_s=0.0)))


def test_when_no_other_pipeline_comes_everybody_hears_why() -> None:
    core = machine()
    core.handle(submitted("a"))
    gone = events.PipelineGone(error=to_data(StageLost("stage 1 was lost")))
    assert [command.request_id for command in core.handle(gone) if isinstance(command, commands.FailRequest)] == ["a"]
    (refused,) = core.handle(submitted("b"))
    assert isinstance(refused, commands.FailRequest)
    assert refused.error.message == "stage 1 was lost"


def test_prompt_scores_that_the_client_has_are_not_sent_again() -> None:
    sequence = Sequence(0, 0, submitted("a", prompt_len=5))
    scores = tuple(TokenLogprobs(7, -0.5, rank) for rank in (1, 2, 3, 4))
    assert sequence.scores.unseen(scores[:2]) == scores[:2]
    sequence.move(SequenceState.PREFILLING)
    sequence.lose_cache(1)
    assert sequence.scores.unseen(scores[:1]) == ()
    assert sequence.scores.unseen(scores[1:3]) == scores[2:3]
    assert sequence.scores.unseen(scores[3:]) == scores[3:]


def test_a_request_goes_on_after_the_tokens_of_a_coordinator_before() -> None:
    core = machine()
    (step,) = steps(core.handle(dataclasses.replace(submitted("a"), generated_token_ids=(21, 22))))
    assert step.delta.opened[0].token_ids == (5, 5, 5, 21, 22)
    assert tokens_of(answer(core, step, 23)) == [("a", 2, 23)]


def test_a_request_of_which_only_the_end_was_lost_ends_at_once() -> None:
    core = machine()
    resumed = dataclasses.replace(submitted("a", max_new_tokens=2), generated_token_ids=(21, 22))
    (finished,) = core.handle(resumed)
    assert isinstance(finished, commands.FinishRequest)
    assert (finished.finish_reason, finished.num_completion_tokens) == (FinishReason.LENGTH, 2)


def test_a_prompt_longer_than_the_kv_memory_is_refused_even_when_it_came_early() -> None:
    core = Machine(machine().limits)
    core.handle(submitted("a", prompt_len=100))
    (refused,) = core.handle(events.PipelineReady(epoch=1, kv_blocks=10, at_s=0.0))
    assert isinstance(refused, commands.FailRequest)
    assert "KV memory takes 1 to 39 tokens" in refused.error.message


def test_a_barrier_holds_micro_batches_until_all_are_back() -> None:
    core = Machine(machine(schedule=Schedule.BARRIER).limits)
    for name in "ab":
        core.handle(submitted(name))
    first, second = steps(core.handle(events.PipelineReady(epoch=1, kv_blocks=1000, at_s=0.0)))
    assert not steps(answer(core, first, 9))
    assert len(steps(answer(core, second, 9))) == 2


def test_a_static_batch_is_padded_and_takes_nobody_before_its_end() -> None:
    core = Machine(machine(schedule=Schedule.STATIC, num_micro_batches=1, max_sequences_per_micro_batch=2).limits)
    core.handle(submitted("a", prompt_len=3, max_new_tokens=1))
    core.handle(submitted("b", prompt_len=8, max_new_tokens=3))
    core.handle(submitted("c"))
    (step,) = steps(core.handle(events.PipelineReady(epoch=1, kv_blocks=1000, at_s=0.0)))
    assert ([chunk.count for chunk in step.delta.chunks], step.delta.padding) == ([3, 8], 5)
    (step,) = steps(answer(core, step, 9, 9))
    assert (step.delta.token_ids, step.delta.padding, step.delta.opened) == ((9,), 1, ())
    (step,) = steps(answer(core, step, 9))
    (step,) = steps(answer(core, step, 9))
    assert [opened.sequence for opened in step.delta.opened] == [2]


def test_tokens_that_nobody_asked_for_break_the_protocol() -> None:
    core = machine()
    (step,) = steps(core.handle(submitted("a")))
    with pytest.raises(WireError, match="2 tokens, where 1 were to come"):
        answer(core, step, 9, 9)
    with pytest.raises(WireError, match="not in flight"):
        answer(core, Step(epoch=1, micro_batch=1, step=0, delta=step.delta))
    with pytest.raises(WireError, match="0 timings"):
        core.handle(events.TokensArrived(tokens=Tokens(epoch=1, micro_batch=0, step=0, token_ids=(9,)), at_s=0.0))


@pytest.mark.parametrize(
    ("layers", "stages", "split", "expected"),
    [
        (7, 3, None, ((0, 3), (3, 5), (5, 7))),
        (4, 4, None, ((0, 1), (1, 2), (2, 3), (3, 4))),
        (12, 3, (5, 4, 3), ((0, 5), (5, 9), (9, 12))),
    ],
)
def test_layers_are_split_contiguously(
    layers: int, stages: int, split: tuple[int, ...] | None, expected: tuple[tuple[int, int], ...]
) -> None:
    assert split_layers(layers, stages, split) == tuple(LayerRange(*pair) for pair in expected)


@pytest.mark.parametrize(
    ("stages", "split", "words"),
    [(5, None, "4 layers"), (2, (1, 1), "adds up to 2"), (2, (4, 0), "at least one"), (3, (2, 2), "3 stages")],
)
def test_a_split_that_does_not_fit_is_refused(stages: int, split: tuple[int, ...] | None, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        split_layers(4, stages, split)
