"""Norms, rotary positions and gates by compiled kernels, against torch's of the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from asyncpipe_workers.layout import Rotation
from asyncpipe_workers.models import layers, row_kernels
from asyncpipe_workers.models.layers import ACTIVATIONS, RMSNorm, gated, scaled
from asyncpipe_workers.models.rope import rotate
from asyncpipe_workers.models.row_kernels import row_kernel

EPS = 1e-5


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_torch(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (layers, sys.modules[rotate.__module__]):
            patch.setattr(module, "row_kernel", lambda *_: None)
        return compute()


@pytest.fixture
def is_compiled() -> None:
    if row_kernel("TurnRows", torch.empty(1, 16), 16) is None:
        pytest.skip("no kernels are compiled here")


@pytest.fixture
def lanes(lanes: None) -> Iterator[None]:
    row_kernels._compiled.cache_clear()
    yield
    row_kernels._compiled.cache_clear()


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_norms_are_those_of_torch(rows: int) -> None:
    norm, x = RMSNorm(numbers(256, seed=1), EPS), numbers(rows, 256) * 3
    torch.testing.assert_close(norm(x), by_torch(lambda: norm(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("lanes")
def test_norms_of_heads_are_those_of_torch_where_they_lie() -> None:
    """Queries and keys beside values."""
    norm, qkv_TNK = RMSNorm(numbers(6, 32, seed=1), EPS), numbers(7, 8, 32)
    qk_TNK = qkv_TNK[:, :6]
    found = norm(qk_TNK)
    torch.testing.assert_close(found, by_torch(lambda: norm(qk_TNK)), rtol=1e-5, atol=1e-6)
    assert torch.equal(qkv_TNK, numbers(7, 8, 32)), "what is normed stays"


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("turned", [16, 32])
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_rotations_are_those_of_torch(rows: int, turned: int) -> None:
    """Of all of a head, or of its first half."""
    angles_TF = numbers(rows, turned, seed=2) * 3
    rotation = Rotation(torch.cat([angles_TF.cos()] * 2, dim=-1)[:, None], angles_TF.sin()[:, None])
    qkv_TNK = numbers(rows, 8, 64)
    expected = by_torch(lambda: rotate(qkv_TNK[:, :6].clone(), rotation))
    found = rotate(qkv_TNK[:, :6], rotation)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(qkv_TNK[:, 6:], numbers(rows, 8, 64)[:, 6:]), "values are not turned"


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_gates_are_those_of_torch(rows: int, activation: str) -> None:
    gate_up = (numbers(rows, 600) * 4)[:, :512]
    if rows:
        gate_up[0, :4] = torch.tensor([0.0, -1e4, 1e4, -90.0])
    expected = by_torch(lambda: gated(gate_up.clone(), activation))
    torch.testing.assert_close(gated(gate_up, activation), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_queries_are_scaled_where_they_lie(rows: int) -> None:
    qkv_TNK = numbers(rows, 8, 32)
    expected = torch.cat([qkv_TNK[:, :4] * 0.8165, qkv_TNK[:, 4:]], dim=1)
    assert scaled(qkv_TNK[:, :4], 0.8165).data_ptr() == qkv_TNK.data_ptr()
    assert torch.equal(qkv_TNK, expected), "keys and values are not"


@pytest.mark.usefixtures("is_compiled")
def test_a_nan_stays_in_its_row() -> None:
    x = numbers(4, 64)
    x[1, 5] = torch.nan
    normed, gates = RMSNorm(torch.ones(64), EPS)(x), gated(x, "silu")
    assert normed.isnan().any(1).tolist() == gates.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize("x", [numbers(4, 60), numbers(4, 64).bfloat16(), torch.empty(4, 64, device="meta")])
def test_what_kernels_are_not_for_is_torchs(x: torch.Tensor) -> None:
    assert row_kernel("RMSNormRows", x, x.shape[1], EPS) is None
    assert RMSNorm(torch.ones(x.shape[1], device=x.device), EPS)(x).shape == x.shape
    assert gated(x.repeat(1, 2), "silu").dtype == x.dtype


def test_without_a_compiler_all_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpipe_workers.compiled.rows", None)
    monkeypatch.delattr("asyncpipe_workers.compiled.rows", raising=False)
    row_kernels._compiled.cache_clear()
    assert row_kernel("RMSNormRows", numbers(4, 64), 64, EPS) is None
    row_kernels._compiled.cache_clear()
