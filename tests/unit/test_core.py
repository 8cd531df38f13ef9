"""Single decisions of the scheduling core."""

from __future__ import annotations

import pytest

from asyncpipe.errors import Invalid, WireError
from asyncpipe.wire.messages import FinishReason, Sampling, Step, Tokens
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.machine import Limits, Machine
from asyncpipe_coordinator.core.partition import LayerRange, split_layers

EOS = 2


def machine(*, micro_batches: int = 2, max_sequences: int = 8, max_waiting: int = 100) -> Machine:
    ready = Machine(
        Limits(
            num_micro_batches=micro_batches,
            max_sequences_per_micro_batch=max_sequences,
            max_waiting=max_waiting,
            max_context_len=32,
            eos_token_ids=frozenset({EOS}),
        )
    )
    ready.handle(events.PipelineReady(epoch=1, at_s=0.0))
    return ready


def submitted(request_id: str, *, prompt_len: int = 3, max_new_tokens: int = 4, ignore_eos: bool = False) -> events.Submitted:
    return events.Submitted(
        request_id=request_id,
        client="c",
        prompt_token_ids=(5,) * prompt_len,
        sampling=Sampling(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos),
        seed=0,
        deadline_at_s=None,
        at_s=0.0,
    )


def steps(done: list[commands.Command]) -> list[Step]:
    return [command.step for command in done if isinstance(command, commands.IssueStep)]


def answer(core: Machine, step: Step, *token_ids: int) -> list[commands.Command]:
    tokens = Tokens(epoch=step.epoch, micro_batch=step.micro_batch, step=step.step, token_ids=token_ids)
    return core.handle(events.TokensArrived(tokens=tokens, at_s=1.0))


def test_a_micro_batch_is_issued_again_without_waiting_for_the_others() -> None:
    core = machine()
    (first,) = steps(core.handle(submitted("a")))
    (second,) = steps(core.handle(submitted("b")))
    assert (first.micro_batch, second.micro_batch) == (0, 1)
    (again,) = steps(answer(core, first, 9))
    assert (again.micro_batch, again.step, again.delta.token_ids) == (0, 1, (9,))


def test_requests_are_spread_evenly_over_micro_batches() -> None:
    core = Machine(machine()._limits)
    for number in range(6):
        core.handle(submitted(f"r{number}"))
    issued = steps(core.handle(events.PipelineReady(epoch=1, at_s=0.0)))
    assert [len(step.delta.joined) for step in issued] == [3, 3]


def test_the_end_of_sequence_token_ends_a_request_unless_ignored() -> None:
    for ignore_eos, finishes in ((False, True), (True, False)):
        core = machine()
        (step,) = steps(core.handle(submitted("a", ignore_eos=ignore_eos)))
        done = answer(core, step, EOS)
        assert any(isinstance(command, commands.FinishRequest) for command in done) is finishes


def test_a_finished_sequence_leaves_in_the_next_delta_and_its_neighbour_goes_on() -> None:
    core = machine(micro_batches=1)
    (step,) = steps(core.handle(submitted("a")))
    core.handle(submitted("b"))
    (step,) = steps(answer(core, step, 9))
    assert (step.delta.token_ids, len(step.delta.joined)) == ((9,), 1)
    (step,) = steps(answer(core, step, EOS, 8))
    assert (step.delta.left, step.delta.token_ids) == ((0,), (8,))


def test_the_last_step_of_an_empty_micro_batch_only_lets_sequences_leave() -> None:
    core = machine()
    (step,) = steps(core.handle(submitted("a", max_new_tokens=1)))
    done = answer(core, step, 9)
    (finish,) = [command for command in done if isinstance(command, commands.FinishRequest)]
    assert (finish.finish_reason, finish.num_completion_tokens) == (FinishReason.LENGTH, 1)
    (last,) = steps(done)
    assert (last.delta.left, last.delta.token_ids, last.delta.joined) == ((0,), (), ())
    assert answer(core, last) == []


def test_a_full_queue_refuses_with_a_hint() -> None:
    core = machine(micro_batches=1, max_sequences=1, max_waiting=1)
    core.handle(submitted("a"))
    core.handle(submitted("b"))
    (refused,) = core.handle(submitted("c"))
    assert isinstance(refused, commands.FailRequest)
    assert (refused.error.code.value, refused.error.retry_after_s > 0) == ("busy", True)


def test_the_end_of_the_context_ends_a_request() -> None:
    core = machine()
    (step,) = steps(core.handle(submitted("a", prompt_len=31, max_new_tokens=50)))
    reasons = [c.finish_reason for c in answer(core, step, 9) if isinstance(c, commands.FinishRequest)]
    assert reasons == [FinishReason.LENGTH]


def test_tokens_that_nobody_asked_for_break_the_protocol() -> None:
    core = machine()
    (step,) = steps(core.handle(submitted("a")))
    with pytest.raises(WireError, match="2 tokens for 1 sequences"):
        answer(core, step, 9, 9)
    with pytest.raises(WireError, match="not in flight"):
        core.handle(events.TokensArrived(tokens=Tokens(epoch=1, micro_batch=1, step=0, token_ids=()), at_s=0.0))


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
