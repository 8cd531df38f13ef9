"""The race of a draw: its random numbers, and that a compiled kernel draws what torch does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from asyncpipe_workers import drawing
from asyncpipe_workers.drawing import Draw, compiled_draw, drawn, signed, uniforms_of

LARGE = 50_272


@pytest.fixture
def lanes(lanes: None) -> Iterator[None]:
    compiled_draw.cache_clear()
    yield
    compiled_draw.cache_clear()


def by_torch(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "compiled_draw", lambda: None)
        return drawn(logits_RV, draws).tolist()


def random_draws(seed: int, num: int) -> list[Draw]:
    """Each limit is on or off; some let one token through, some all of them."""
    generator = random.Random(seed)
    return [
        Draw(
            temperature=generator.choice([1.0, 0.7, 0.2, 3.0, 100.0, 1e-3, 1e-30, 5e-324]),
            top_k=generator.choice([0, 0, 1, 5, 40, 3000, LARGE, 2**31]),
            top_p=generator.choice([1.0, 1.0, 0.9, 0.5, 0.999, 1e-9, 1 - 2.0**-53]),
            min_p=generator.choice([0.0, 0.0, 0.05, 0.5, 1.0, 0.001, 1e-30]),
            uniform=generator.choice([0.0, generator.random(), 1 - 2.0**-53]),
            key=signed(generator.getrandbits(64)),
        )
        for _ in range(num)
    ]


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    """Flat ones and steep ones, and such as have many equals or are in part impossible."""
    generator = random.Random(seed)
    scale = generator.choice([0.0, 0.01, 0.5, 2.0, 6.0])
    logits_RV = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    if generator.random() < 0.3:
        logits_RV = (logits_RV * 2).round() / 2
    if generator.random() < 0.3:
        logits_RV[:, 1::3] = -torch.inf
    return logits_RV


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("size", [1, 2, 7, 8, 16, 17, 60, 700, 5001, LARGE])
def test_compiled_draws_are_those_of_torch(size: int) -> None:
    assert compiled_draw() is not None
    num_loads, num_different = 4 if size == LARGE else 40, 0
    for seed in range(num_loads):
        logits_RV, draws = random_logits(seed, 8, size), random_draws(seed, 8)
        found, expected = drawn(logits_RV, draws).tolist(), by_torch(logits_RV, draws)
        num_different += sum(one != other for one, other in zip(found, expected, strict=True))
    assert num_different <= 1, "rounding may change a draw, but hardly ever does"


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 33])
def test_rows_are_drawn_where_they_lie_and_by_themselves(num_rows: int) -> None:
    wide_RV, draws = random_logits(3, num_rows, 1000), random_draws(3, num_rows)
    for logits_RV in (wide_RV[:, :700], wide_RV[:, ::2], wide_RV.t()[:num_rows, :num_rows]):
        found = drawn(logits_RV, draws).tolist()
        assert found == drawn(logits_RV.contiguous(), draws).tolist()
        assert found == [drawn(logits_RV[row : row + 1], [draw]).item() for row, draw in enumerate(draws)]


def test_torch_draws_many_rows_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RV, draws = random_logits(5, 11, 60), random_draws(5, 11)
    together = by_torch(logits_RV, draws)
    for most in (1, 60 * 4, 60 * 10):
        monkeypatch.setattr(drawing, "MOST_NUMBERS", most)
        assert by_torch(logits_RV, draws) == together


@pytest.mark.usefixtures("lanes")
def test_what_is_no_number_never_wins() -> None:
    logits_RV = torch.zeros(1, 20)
    logits_RV[0, 3::2] = torch.nan
    found = {int(drawn(logits_RV, [draw])) for draw in random_draws(1, 200)}
    assert found <= {0, 1, *range(2, 20, 2)}
    assert len(found) > 5
    logits_RV[:] = torch.nan
    assert 0 <= int(drawn(logits_RV, random_draws(2, 1))) < 20


def test_random_numbers_are_even_and_depend_on_every_bit_of_key_and_id() -> None:
    ids = torch.arange(LARGE)
    for key in (0, 1, 2**63, 2**64 - 1):
        numbers = uniforms_of(torch.tensor(signed(key)), ids)
        assert 0 < float(numbers.min()) < 1e-3
        assert 1 - 1e-3 < float(numbers.max()) < 1
        assert abs(float(numbers.mean()) - 0.5) < 0.005
        assert abs(float((numbers * numbers.roll(1)).mean()) - 0.25) < 0.005, "neighbours are alike"
        assert torch.equal(uniforms_of(torch.tensor(signed(key)), ids[1000:1010]), numbers[1000:1010])
        for bit in range(64):
            other = uniforms_of(torch.tensor(signed(key ^ (1 << bit))), ids)
            assert abs(float((numbers * other).mean()) - 0.25) < 0.01, f"bit {bit} of the key"
