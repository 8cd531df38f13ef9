"""Tokens from logits: the parameters against Hugging Face and their definitions, and what a draw may depend on.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from asyncpipe.wire.messages import Sampling
from asyncpipe_workers import drawing
from asyncpipe_workers.drawing import weights_of
from asyncpipe_workers.sampling import Sampled, Sampler, chosen, sample, score

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL, LARGE = 60, 50_272
ALMOST_ONE = 1 - 2.0**-53
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["compiled", "torch"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws by a compiled kernel, and where there is none."""
    if request.param == "torch":
        monkeypatch.setattr(drawing, "compiled_draw", lambda: None)
    elif drawing.compiled_draw() is None:
        pytest.skip("no kernels are compiled here")


def new(prompt: Sequence[int] = (1,), generated: Sequence[int] = (), *, ends: Sequence[int] = (), **options: Any) -> Sampler:
    sampling = Sampling(**({"temperature": 1.0} | options))
    return Sampler(sampling, [*prompt, *generated], num_prompt=len(prompt), eos_token_ids=frozenset(ends))


def choose(sampler: Sampler, logits_V: torch.Tensor) -> int:
    (token_id,) = sample(logits_V[None], [sampler]).token_ids
    return token_id


def random_logits(size: int, *, seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def hugging_face(logits_V: torch.Tensor, token_ids: Sequence[int], options: dict[str, Any]) -> torch.Tensor:
    """Probabilities after its processors, in the order in which its `generate` applies them."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        processors.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    scores_1V: torch.Tensor = processors(torch.tensor([token_ids]), logits_V.double()[None])  # type: ignore[arg-type]
    return scores_1V[0].softmax(dim=-1)


def probabilities(sampler: Sampler, logits_V: torch.Tensor) -> torch.Tensor:
    """Of each token, (V,): the weights that it races with, and how often it may."""
    scores_V = logits_V.float()
    if sampler.changes_logits:
        scores_V = scores_V.clone()
        sampler.change(scores_V)

    def racing(uniform: float) -> torch.Tensor:
        (weights_V,) = weights_of(scores_V[None], [sampler.draw._replace(uniform=uniform)])
        return weights_V

    likely_V, others_V = racing(0.0), racing(ALMOST_ONE)
    if torch.equal(likely_V, others_V):
        return likely_V / likely_V.sum()
    assert not (likely_V * others_V).any()
    probabilities_V = (likely_V + others_V) / (likely_V + others_V).sum()
    share = float(probabilities_V[likely_V > 0].sum())
    assert torch.equal(racing(share - 1e-9), likely_V)
    assert torch.equal(racing(share + 1e-9), others_V)
    return probabilities_V


def assert_draws_follow(expected_V: torch.Tensor, sampler: Sampler, logits_V: torch.Tensor) -> None:
    found_V = probabilities(sampler, logits_V)
    assert not found_V[expected_V == 0].any(), "a token may be drawn that cannot be"
    torch.testing.assert_close(found_V, expected_V.double(), rtol=1e-5, atol=1e-12)


def random_options(seed: int) -> dict[str, Any]:
    """Some of the parameters, with random values."""
    generator = random.Random(seed)
    options = {
        "repetition_penalty": generator.uniform(0.5, 2.0),
        "temperature": generator.uniform(0.2, 3.0),
        "top_k": generator.randint(1, SMALL + 5),
        "top_p": generator.uniform(0.05, 0.999),
        "min_p": generator.uniform(0.001, 0.5),
    }
    return {name: options[name] for name in generator.sample(sorted(options), generator.randint(1, 5))}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.6},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": SMALL - 1},
        {"top_k": SMALL + 100},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.99},
        {"min_p": 0.02},
        {"min_p": 0.5},
        {"min_p": 1.0},
        *(random_options(seed) for seed in range(12)),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_hugging_face_says(options: dict[str, Any]) -> None:
    logits_V = random_logits(SMALL, seed=len(str(options)))
    prompt, generated = [3, 3, 50, 7], [8, 9, 8, *logits_V.topk(3).indices.tolist()]
    expected_V = hugging_face(logits_V, prompt + generated, options)
    assert_draws_follow(expected_V, new(prompt, generated, **options), logits_V)


@pytest.mark.parametrize(
    ("scale", "options"),
    [
        (6.0, {"top_p": 0.9}),  # few tokens
        (1.0, {"top_p": 0.9}),  # many thousands
        (1.0, {"top_p": 0.9, "min_p": 0.02, "temperature": 0.8}),
        (1.0, {"min_p": 0.001}),
        (4.0, {"min_p": 0.05}),
        (1.0, {"top_k": 3000, "top_p": 0.95}),
        (0.001, {"top_p": 0.5}),
    ],
    ids=str,
)
def test_of_a_large_vocabulary_the_right_tokens_are_kept(scale: float, options: dict[str, Any]) -> None:
    logits_V = random_logits(LARGE, seed=5, scale=scale)
    assert_draws_follow(hugging_face(logits_V, [1], options), new(**options), logits_V)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_a_large_vocabulary_without_limits_is_drawn_from_as_a_whole(scale: float) -> None:
    logits_V = random_logits(LARGE, seed=6, scale=scale)
    assert_draws_follow(logits_V.double().softmax(dim=-1), new(), logits_V)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(("size", "scale"), [(4, 1.0), (SMALL, 2.0), (SMALL, 5.0)])
def test_tokens_win_as_often_as_they_weigh(size: int, scale: float) -> None:
    """Pearson's test, over the tokens that are expected often enough for it; the others together are one more."""
    logits_V, num = random_logits(size, seed=1, scale=scale), 4000
    expected_V = logits_V.double().softmax(dim=-1) * num
    counts = Counter(choose(new(seed=seed), logits_V) for seed in range(num))
    counts_V = torch.tensor([counts[token_id] for token_id in range(size)], dtype=torch.float64)
    is_rare_V = expected_V < 20
    expected = torch.cat([expected_V[~is_rare_V], expected_V[is_rare_V].sum()[None]]) + 1e-9
    found = torch.cat([counts_V[~is_rare_V], counts_V[is_rare_V].sum()[None]])
    statistic, freedom = float(((found - expected) ** 2 / expected).sum()), len(expected) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


@pytest.mark.usefixtures("each_way")
def test_rounding_changes_no_draw() -> None:
    """Logits as different as those of decoding and of computing the same tokens again. By a running sum over the vocabulary
    some two dozen of these draws would change."""
    generator, num_changed = torch.Generator().manual_seed(7), 0
    for number in range(20):
        logits_V = random_logits(LARGE, seed=number, scale=3.0)
        rounded_V = logits_V * (1 + 1e-6 * torch.randn(LARGE, generator=generator))
        num_changed += sum(choose(new(seed=seed), logits_V) != choose(new(seed=seed), rounded_V) for seed in range(100))
    assert num_changed == 0


def changed(logits_V: torch.Tensor, changes: dict[int, float]) -> torch.Tensor:
    """Probabilities with `changes` added to some logits."""
    scores_V = logits_V.double()
    for token_id, change in changes.items():
        scores_V[token_id] += change
    return scores_V.softmax(dim=-1)


@pytest.mark.parametrize("presence_penalty", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("frequency_penalty", [-0.5, 0.0, 0.7])
def test_presence_and_frequency_penalties_count_generated_tokens_only(
    presence_penalty: float, frequency_penalty: float
) -> None:
    logits_V = random_logits(SMALL, seed=1, scale=1.0)
    generated = [4, 5, 4, 6, 4, 5]
    options: dict[str, Any] = {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
    penalties = {token_id: presence_penalty + frequency_penalty * count for token_id, count in Counter(generated).items()}
    expected_V = changed(logits_V, {token_id: -penalty for token_id, penalty in penalties.items()})
    assert_draws_follow(expected_V, new([4, 9, 9, 9], generated, **options), logits_V)
    assert_draws_follow(logits_V.double().softmax(dim=-1), new([4, 9, 9, 9], **options), logits_V)


def test_tokens_that_are_pushed_are_penalized() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0])
    sampler = new([1, 1], temperature=0.0, frequency_penalty=1.0)
    chosen = []
    for _ in range(5):
        chosen.append(choose(sampler, logits_V))
        sampler.push(chosen[-1])
    assert chosen == [1, 1, 2, 0, 1]  # of equals, the first
    assert (sampler.num_generated, sampler.num_tokens) == (5, 7)


def test_logit_bias_is_added_and_unknown_tokens_are_ignored() -> None:
    logits_V = random_logits(SMALL, seed=2)
    bias = {0: 2.5, 7: -1.0, SMALL - 1: 3.0, SMALL: 100.0, 2**31 - 1: 100.0}
    expected_V = changed(logits_V, {token_id: value for token_id, value in bias.items() if token_id < SMALL})
    assert_draws_follow(expected_V, new(logit_bias=bias), logits_V)
    assert choose(new(logit_bias={17: 100.0}, temperature=0.0), logits_V) == 17
    likeliest = int(logits_V.argmax())
    assert probabilities(new(logit_bias={likeliest: -100.0}), logits_V)[likeliest] < 1e-40


def test_the_repetition_penalty_comes_before_what_is_added() -> None:
    logits_V = random_logits(SMALL, seed=3)
    options: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {5: 1.0, 6: -1.0}}
    penalized_V = hugging_face(logits_V, [5, 4, 4], {"repetition_penalty": 1.4}).log()
    expected_V = changed(penalized_V, {4: -1.0, 5: 1.0, 6: -1.0})
    assert_draws_follow(expected_V, new([5], [4, 4], repetition_penalty=1.4, **options), logits_V)


@pytest.mark.parametrize("num_generated", range(5))
def test_no_end_comes_before_min_tokens(num_generated: int) -> None:
    logits_V = random_logits(SMALL, seed=4)
    first, second, third, fourth, fifth = logits_V.topk(5).indices.tolist()
    options: dict[str, Any] = {"ends": [first, third], "min_tokens": 3, "stop_token_ids": (0, second, fourth, SMALL + 3)}
    is_early = num_generated < 3
    prompt, generated = [7] * 5, [8] * num_generated
    banned = {token_id: -float("inf") for token_id in (0, first, second, third, fourth) if is_early}
    assert_draws_follow(changed(logits_V, banned), new(prompt, generated, **options), logits_V)
    assert choose(new(prompt, generated, temperature=0.0, **options), logits_V) == (fifth if is_early else first)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0, "top_k": 1}, {"top_p": 1e-9, "temperature": 100.0}], ids=str
)
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_one_candidate_is_the_greedy_choice(options: dict[str, Any], dtype: torch.dtype, scale: float) -> None:
    for seed, size in enumerate([1, 2, SMALL, 700, 3000, LARGE]):
        logits_V = random_logits(size, seed=seed, scale=scale).to(dtype)
        logits_V[size // 3 :: 7] = logits_V.max()  # of equals, the first is the greedy choice
        for number in range(3):
            assert choose(new(seed=number, **options), logits_V) == int(logits_V.argmax())


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_the_smallest_temperatures_are_greedy(temperature: float, options: dict[str, Any]) -> None:
    logits_V = torch.arange(2000.0).roll(77) - 1000
    for seed in range(5):
        assert choose(new(temperature=temperature, seed=seed, **options), logits_V) == 76


def test_equal_logits_are_kept_in_the_order_of_their_ids() -> None:
    logits_V = torch.zeros(LARGE)
    assert probabilities(new(top_k=4), logits_V).nonzero().flatten().tolist() == [0, 1, 2, 3]
    logits_V[1000:2000] = 5.0
    found_V = probabilities(new(top_k=10, temperature=0.5), logits_V)
    assert found_V.nonzero().flatten().tolist() == list(range(1000, 1010))


def test_a_token_that_begins_where_top_p_ends_is_not_kept() -> None:
    logits_V = torch.zeros(4)
    assert probabilities(new(top_p=0.5), logits_V).tolist() == [0.5, 0.5, 0.0, 0.0]
    assert probabilities(new(top_p=0.51), logits_V).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 40, "repetition_penalty": 1.3}, {"min_p": 0.05}], ids=str)
def test_half_precision_logits_are_drawn_from_with_more_precision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    halves_V = random_logits(LARGE, seed=8).to(dtype)
    for seed in range(20):
        sampler = new([1, 2, 3], seed=seed, **options)
        assert choose(sampler, halves_V) == choose(sampler, halves_V.float())
    small_V = random_logits(SMALL, seed=8).to(dtype)
    assert_draws_follow(small_V.double().softmax(dim=-1), new(), small_V)


def draws(logits_V: torch.Tensor, *, seed: int, num: int, **options: Any) -> list[int]:
    """A sequence of its own: the same logits each time."""
    sampler = new(seed=seed, **options)
    for _ in range(num):
        sampler.push(choose(sampler, logits_V))
    return sampler.token_ids[sampler.num_prompt :]


@pytest.mark.usefixtures("each_way")
def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    logits_V = random_logits(SMALL, seed=9)
    for options in ({}, {"top_p": 0.9}, {"top_k": 20}):
        of_seeds = [tuple(draws(logits_V, seed=seed, num=30, **options)) for seed in (0, 1, 2, 2**32, 2**63 - 1)]
        again = [tuple(draws(logits_V, seed=seed, num=30, **options)) for seed in (0, 1, 2, 2**32, 2**63 - 1)]
        assert of_seeds == again
        assert len(set(of_seeds)) == len(of_seeds)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9999}], ids=str)
def test_draws_are_even_over_seeds_over_positions_and_over_pairs_of_positions(options: dict[str, Any]) -> None:
    logits_V = torch.zeros(8)
    over_seeds = [choose(new(seed=seed, **options), logits_V) for seed in range(4000)]
    over_positions = draws(logits_V, seed=5, num=4000, **options)
    neighbours = [8 * first + second for first, second in zip(over_positions[::2], over_positions[1::2], strict=True)]
    for drawn, num_cells in ((over_seeds, 8), (over_positions, 8), (neighbours, 64)):
        expected = len(drawn) / num_cells
        chi_square = sum((drawn.count(cell) - expected) ** 2 / expected for cell in range(num_cells))
        mean, deviation = num_cells - 1, (2 * (num_cells - 1)) ** 0.5
        assert abs(chi_square - mean) < 5 * deviation


def test_a_draw_depends_on_the_seed_and_the_number_of_generated_tokens_but_not_on_which_they_were() -> None:
    logits_V = random_logits(SMALL, seed=10)
    for num_generated in range(20):
        one = choose(new([1], [2] * num_generated, seed=3), logits_V)
        other = choose(new([9, 8, 7, 6], list(range(num_generated)), seed=3), logits_V)
        assert one == other
    assert len({choose(new([1], [2] * num_generated, seed=3), logits_V) for num_generated in range(20)}) > 3


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 1, "top_p": 0.8},
    {"seed": 2, "top_k": 5, "logprobs": 3},
    {"seed": 3, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": {3: 2.0}},
    {"seed": 4, "frequency_penalty": 0.3, "min_tokens": 9},
]


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [SMALL, 5000])
def test_neighbours_in_the_batch_and_the_order_of_rows_change_nothing(dtype: torch.dtype, size: int) -> None:
    logits_RV = random_logits(len(MIXED) * size, seed=11).view(len(MIXED), size).to(dtype)

    def sampled(rows: list[int]) -> Sampled:
        return sample(logits_RV[rows], [new([row], [5, 6, 5], ends=[2], **MIXED[row]) for row in rows])

    alone = [sampled([row]) for row in range(len(MIXED))]
    for seed in range(4):
        rows = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
        together = sampled(rows)
        assert together.token_ids == tuple(alone[row].token_ids[0] for row in rows)
        assert together.logprobs == tuple((alone[row].logprobs or (None,))[0] for row in rows)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_the_logits_stay_as_they_are(dtype: torch.dtype) -> None:
    logits_RV = random_logits(len(MIXED) * SMALL, seed=11).view(len(MIXED), SMALL).to(dtype)
    before_RV = logits_RV.clone()
    sample(logits_RV, [new([1], [5, 6, 5], ends=[2], **options) for options in MIXED])
    assert torch.equal(logits_RV, before_RV)


def test_greedy_rows_are_the_likeliest_tokens_and_of_equals_the_first() -> None:
    logits_RV = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, -1.0, 3.0, 3.0]])
    for dtype in (torch.float32, *HALVES):
        assert sample(logits_RV.to(dtype), [new(temperature=0.0)] * 2) == Sampled((1, 0))
        assert sample(logits_RV.to(dtype), [new(temperature=0.0, logprobs=0)] * 2).token_ids == (1, 0)


def test_no_sequences_give_no_tokens() -> None:
    assert sample(torch.empty(0, SMALL), []) == Sampled(())


def test_logprobs_are_given_to_those_that_ask_and_are_the_models_own() -> None:
    """Neither temperature nor penalties nor limits show in them."""
    logits_RV = random_logits(4 * SMALL, seed=12).view(4, SMALL)
    options: list[dict[str, Any]] = [
        {"temperature": 3.0, "top_k": 5, "seed": 1, "logprobs": 2},
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": {9: 100.0}, "logprobs": 0},
        {"temperature": 0.0, "logprobs": 5},
    ]
    sampled = sample(logits_RV, [new(**one) for one in options])
    assert sampled.logprobs[1] is None
    assert sampled.token_ids[2] == 9
    for row, num_top in ((0, 2), (2, 0), (3, 5)):
        scored = sampled.logprobs[row]
        assert (scored,) == score(logits_RV[row : row + 1], [sampled.token_ids[row]], num_top)
    assert sample(logits_RV, [new(), new(), new(), new()]).logprobs == ()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_scores_are_log_softmax_ranks_and_the_likeliest_alternatives(dtype: torch.dtype, num_top: int) -> None:
    logits_RV = random_logits(5 * SMALL, seed=13).view(5, SMALL).to(dtype)
    expected_RV = logits_RV.double().log_softmax(dim=-1)
    token_ids = [int(logits_RV[0].argmax()), int(logits_RV[1].argmin()), 0, SMALL - 1, 7]
    scored = score(logits_RV, token_ids, num_top)
    assert [one.token_id for one in scored] == token_ids
    assert scored[0].rank == 1
    assert scored[1].rank == SMALL
    for one, expected_V in zip(scored, expected_RV, strict=True):
        assert one.logprob == pytest.approx(float(expected_V[one.token_id]), abs=1e-5)
        assert one.rank == 1 + sum(value > expected_V[one.token_id] for value in expected_V)
        top_logprobs = [alternative.logprob for alternative in one.top]
        assert top_logprobs == pytest.approx(expected_V.sort(descending=True).values[:num_top].tolist(), abs=1e-5)
        assert len({alternative.token_id for alternative in one.top}) == num_top
        for alternative in one.top:
            assert alternative.logprob == pytest.approx(float(expected_V[alternative.token_id]), abs=1e-5)


def test_no_more_alternatives_are_given_than_there_are_tokens() -> None:
    (scored,) = score(torch.tensor([[1.0, 3.0, 2.0]]), [0], 20)
    assert [alternative.token_id for alternative in scored.top] == [1, 2, 0]
    assert scored.rank == 3


def test_nothing_looks_at_a_number_before_all_are_chosen() -> None:
    """Else a GPU's thread would wait: tensors on `meta` have shapes and no numbers."""
    samplers = [new([row], [5, 6, 5], ends=[2], **options) for row, options in enumerate(MIXED)]
    logits_RV = torch.empty(len(MIXED), SMALL, device="meta")
    assert chosen(logits_RV, samplers).shape == (len(MIXED),)
    with pytest.raises(RuntimeError, match="meta"):
        sample(logits_RV, samplers)
