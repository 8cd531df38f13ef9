"""Experts of few rows by compiled kernels, against torch's arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from asyncpipe_workers.models import row_kernels
from asyncpipe_workers.models.expert_calls import Expert, ExpertCalls
from asyncpipe_workers.models.row_kernels import row_kernel

HIDDEN, SIZE, NUM_EXPERTS = 64, 32, 6


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def lanes(lanes: None) -> Iterator[None]:
    row_kernels._compiled.cache_clear()
    yield
    row_kernels._compiled.cache_clear()


def chosen(scores_TX: torch.Tensor, num: int, *, sum_to_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Skips where nothing is compiled."""
    rows, num_experts = scores_TX.shape
    choose = row_kernel("ChooseExperts", scores_TX, 0, num_experts, num, sum_to_one)
    if choose is None:
        pytest.skip("no kernels are compiled here")
    chosen_TN, shares_TN = torch.empty(rows, num, dtype=torch.int64), torch.empty(rows, num)
    choose((scores_TX, chosen_TN, shares_TN), (rows,))
    return chosen_TN, shares_TN


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("sum_to_one", [False, True])
@pytest.mark.parametrize(("num_experts", "num"), [(5, 2), (8, 8), (16, 1), (60, 4), (128, 8)])
def test_the_largest_scores_are_chosen(num_experts: int, num: int, sum_to_one: bool) -> None:
    scores_TX = numbers(40, num_experts) * 3
    scores_TX[3] -= 1e6
    found_TN, shares_TN = chosen(scores_TX, num, sum_to_one=sum_to_one)
    expected_TX = torch.softmax(scores_TX.double(), dim=-1)
    expected_TN = expected_TX.topk(num).indices.sort().values
    expected_shares_TN = expected_TX.gather(1, expected_TN)
    if sum_to_one:
        expected_shares_TN /= expected_shares_TN.sum(dim=1, keepdim=True)
    assert torch.equal(found_TN, expected_TN)
    torch.testing.assert_close(shares_TN.double(), expected_shares_TN, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sum_to_one", [False, True])
def test_odd_scores_choose_experts_that_are_there(odd: float, sum_to_one: bool) -> None:
    """Of a broken sequence, whose results are none, beside others."""
    scores_TX = numbers(4, 12)
    scores_TX[1] = odd
    scores_TX[2, 3:5] = odd
    found_TN, shares_TN = chosen(scores_TX, 3, sum_to_one=sum_to_one)
    assert all(len(set(row)) == 3 and set(row) <= set(range(12)) for row in found_TN.tolist())
    assert shares_TN[1].isnan().all()
    assert shares_TN[2].isnan().all() == (odd != -torch.inf)
    assert shares_TN[[0, 3]].isfinite().all()


def compiled_experts(count: int = NUM_EXPERTS) -> list[Expert]:
    """Of two products with a gate in between. Skips where nothing is compiled."""
    try:
        from asyncpipe_workers.compiled.linears import CompiledFloatLinear
    except ImportError:
        pytest.skip("there is no compiler here")
    from asyncpipe_workers.models.layers import gated

    def made(seed: int) -> Expert:
        try:
            up = CompiledFloatLinear(numbers(2 * SIZE, HIDDEN, seed=seed), None)
            down = CompiledFloatLinear(numbers(HIDDEN, SIZE, seed=seed + 1000), None)
        except NotImplementedError as error:
            pytest.skip(str(error))
        return lambda x_1D: down(gated(up(x_1D), "silu"))

    return [made(seed) for seed in range(count)]


@pytest.mark.parametrize("rows", [1, 3])
def test_each_row_goes_through_its_own_experts(rows: int) -> None:
    experts = compiled_experts()
    calls = ExpertCalls(experts, HIDDEN)
    generator = torch.Generator().manual_seed(rows)
    for step in range(5):
        x_TD, shares_TN = numbers(rows, HIDDEN, seed=step), numbers(rows, 2, seed=step).abs()
        chosen_TN = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:2] for _ in range(rows)])
        expected = [
            sum(experts[expert](x_D[None])[0] * share for expert, share in zip(own, shares, strict=True))
            for x_D, own, shares in zip(x_TD, chosen_TN.tolist(), shares_TN, strict=True)
        ]
        torch.testing.assert_close(calls(x_TD, chosen_TN, shares_TN), torch.stack(expected), rtol=0, atol=0)


def test_experts_that_cannot_be_noted_down_are_refused() -> None:
    experts = compiled_experts()
    with pytest.raises(NotImplementedError, match=r"aten\.mul"):
        ExpertCalls([*experts, lambda x_1D: x_1D * 2], HIDDEN)
    with pytest.raises(NotImplementedError, match="not alike"):
        ExpertCalls([*experts, lambda x_1D: experts[0](experts[1](x_1D))], HIDDEN)


def test_sizes_without_kernels_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="70"):
        ExpertCalls(compiled_experts(), 70)
