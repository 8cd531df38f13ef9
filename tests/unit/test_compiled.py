"""Products compiled for this processor, against torch's of the same numbers."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec
from asyncpipe_workers.models.kernels import ResidentLinear

if platform.machine() != "x86_64":
    pytest.skip("products are compiled for x86-64 processors only", allow_module_level=True)


from asyncpipe_workers.compiled import compiler, linears
from asyncpipe_workers.compiled.compiler import lanes_of
from asyncpipe_workers.compiled.int4_product import Int4Product, WidenedInt4Product
from asyncpipe_workers.compiled.linears import (
    FLOAT_PRODUCTS,
    CompiledFloatLinear,
    CompiledInt4Linear,
    CompiledInt8Linear,
    lay_out,
)
from asyncpipe_workers.compiled.product import Product
from asyncpipe_workers.compiled.products import FloatProduct, Int8Product, WidenedInt8Product

FLOATS = {f"{dtype}".removeprefix("torch."): dtype for dtype in FLOAT_PRODUCTS}
KINDS: dict[str, type[Product]] = {name: FLOAT_PRODUCTS[dtype] for name, dtype in FLOATS.items()}
KINDS_OF_CODES: dict[str, type[Product]] = {
    "int8": Int8Product,
    "int4": Int4Product,
    "int8_widened": WidenedInt8Product,
    "int4_widened": WidenedInt4Product,
}
KINDS |= KINDS_OF_CODES


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(kind: str, weight: torch.Tensor, bias: torch.Tensor | None = None, group_size: int = 64) -> ResidentLinear:
    """Skips where the processor has not what it needs."""
    codec, in_size = GroupCodec(group_size), weight.shape[1]
    forms: dict[str, Callable[[], ResidentLinear]] = {
        "int8": lambda: CompiledInt8Linear(RowCodec().encode(weight), in_size, bias),
        "int4": lambda: CompiledInt4Linear(codec, codec.encode(weight), in_size, bias),
    }
    try:
        lanes_of(KINDS[kind])
    except NotImplementedError as error:
        pytest.skip(str(error))
    if kind in FLOATS:
        return CompiledFloatLinear(weight.to(FLOATS[kind]), bias)
    with pytest.MonkeyPatch.context() as patch:
        for products in ("INT8_PRODUCTS", "INT4_PRODUCTS"):
            patch.setattr(linears, products, (KINDS[kind],))
        return forms[kind.removesuffix("_widened")]()


def as_kept(kind: str, weight: torch.Tensor, group_size: int = 64) -> torch.Tensor:
    """What the quantized weight is worth."""
    if kind in FLOATS:
        return weight.to(FLOATS[kind]).float()
    codec = RowCodec() if kind.startswith("int8") else GroupCodec(group_size)
    return codec.decode(codec.encode(weight), weight.shape[1], dtype=torch.float32)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("lanes", "threads")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 64), (32, 128), (7, 192), (129, 64), (70, 2176)])
def test_products_are_those_of_torch_for_any_number_of_rows(kind: str, shape: tuple[int, int]) -> None:
    weight, bias = numbers(*shape), numbers(shape[0], seed=1)
    linear = made(kind, weight, bias)
    for rows in (1, 2, 3, 4, 7, 8, 13, 40, 64, 150):
        x = numbers(rows, shape[1], seed=rows)
        expected = torch.nn.functional.linear(x, as_kept(kind, weight), bias)
        assert relative_error(linear(x), expected) < (1e-6 if kind in FLOATS else 0.02), rows


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_groups_of_four_bits_may_have_many_sizes(group_size: int) -> None:
    weight, x = numbers(96, 512), numbers(5, 512, seed=2)
    linear = made("int4", weight, group_size=group_size)
    assert relative_error(linear(x), x @ as_kept("int4", weight, group_size).t()) < 0.02


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", KINDS_OF_CODES)
def test_sums_of_integers_are_exact(kind: str) -> None:
    """Rows whose largest magnitude is 127 are their own codes; so is a weight of suitable numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (127, 256), generator=generator).float()
    x[:, ::32] = 127
    high = 127 if kind.startswith("int8") else 15
    weight = torch.randint(-127 if kind.startswith("int8") else 0, high + 1, (70, 256), generator=generator).float()
    weight[:, ::64], weight[:, 1::64] = high, 0
    assert torch.equal(as_kept(kind, weight), weight)
    assert torch.equal(made(kind, weight)(x), x @ weight.t())


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_sums_of_integers_are_there(kind: str) -> None:
    """Where bytes are multiplied as numbers of 16 bits too, which do not hold products of two."""
    weight, x = torch.full((70, 256), 127.0), torch.full((40, 256), 127.0)
    weight[::2] *= -1
    expected = made(kind, weight)(x)
    assert torch.equal(expected[0], x[0] @ as_kept(kind, weight).t())
    assert torch.equal(made(f"{kind}_widened", weight)(x), expected)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_result_is_its_own(kind: str) -> None:
    """Whatever is in the batch, an outlier or a NaN, and however many rows are multiplied at a time."""
    linear, x = made(kind, numbers(96, 1152), numbers(96, seed=1)), numbers(127, 1152, seed=2)
    x[3] *= 1000
    x[5, 7] = torch.nan
    found = linear(x)
    assert found[5].isnan().all()
    alone = torch.cat([linear(row[None]) for row in x])
    torch.testing.assert_close(found, alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_the_bias(kind: str) -> None:
    bias = numbers(40)
    linear = made(kind, numbers(40, 64), bias)
    assert relative_error(linear(torch.zeros(3, 64)), bias.expand(3, 40)) < 1e-6
    assert relative_error(made(kind, torch.zeros(40, 64), bias)(numbers(3, 64)), bias.expand(3, 40)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_lie_in_any_way_and_in_another_type(kind: str) -> None:
    linear, x = made(kind, numbers(96, 64)), numbers(4, 3, 128)[..., 32:96]
    expected = linear(x.contiguous())
    assert expected.shape == (4, 3, 96)
    assert torch.equal(linear(x), expected)
    assert torch.equal(linear(x.bfloat16()), linear(x.bfloat16().float()).bfloat16())
    assert linear(x[:0]).shape == (0, 3, 96)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_fill_no_words_are_not_there(kind: str) -> None:
    with pytest.raises(NotImplementedError, match=r"no compiled product for .*\b70\b"):
        made(kind, numbers(64, 70))


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_numbers_of_sixteen_bits_are_what_they_are(dtype: torch.dtype) -> None:
    """Tiny ones, infinities and those that are none too: a product with one is the number."""
    every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    weight = torch.zeros(1 << 16, 4, dtype=dtype)
    weight[:, 2] = every
    found = made(f"{dtype}".removeprefix("torch."), weight)(torch.eye(4)[2:3])[0]
    torch.testing.assert_close(found, every.float(), rtol=0, atol=0, equal_nan=True)


def test_steps_that_float16_cannot_hold_are_not_there() -> None:
    """Of groups whose numbers are a million apart."""
    weight = numbers(32, 64)
    weight[3, 5] = 3e6
    with pytest.raises(NotImplementedError, match="float16"):
        made("int4", weight)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("num_words", [1, 16, 37])
@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 96, 100])
def test_panels_have_every_word_once_and_zeros_behind(num_rows: int, num_words: int) -> None:
    codes = torch.randint(0, 256, (num_rows, 4 * num_words + 3), dtype=torch.uint8)[:, 1:-2]  # as between other things
    laid_out = lay_out(codes, 32)
    assert laid_out.shape == (-(-num_rows // 32), num_words, 32)
    back = laid_out.transpose(1, 2).reshape(-1, num_words)
    assert torch.equal(back[:num_rows], codes.clone(memory_format=torch.contiguous_format).view(torch.int32))
    assert not back[num_rows:].any()


def test_a_processor_without_vectors_has_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "host_features", dict)
    for kind in KINDS.values():
        with pytest.raises(NotImplementedError, match=f"this processor lacks what {kind.__name__} needs"):
            lanes_of(kind)


def test_without_openmp_there_are_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "OPENMP", ("no_such_function",))
    with pytest.raises(NotImplementedError, match="OpenMP"):
        lanes_of(FloatProduct)


def test_threads_may_multiply_at_once() -> None:
    """Each with the same weight and rows of its own."""
    linear, rows = made("float32", numbers(256, 256)), [numbers(5, 256, seed=seed) for seed in range(8)]
    expected = [linear(x) for x in rows]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert all(torch.equal(*both) for both in zip(pool.map(linear, rows), expected, strict=True))
