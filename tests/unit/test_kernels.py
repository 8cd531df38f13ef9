"""Products in the forms that weights are given: the same numbers as plain ones, as near as the form allows."""

from __future__ import annotations

import itertools
import json
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from asyncpipe_workers import quickest
from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec
from asyncpipe_workers.models import int4, kernels
from asyncpipe_workers.models.int4 import Int4Linear
from asyncpipe_workers.models.int8 import Int8Linear, pack_all, packed_sums_are_exact
from asyncpipe_workers.models.kernels import FloatLinears, PackedLinear, PlainLinear, fits, quickest_form
from asyncpipe_workers.models.quantized import QuantizedLinears, packed_forms
from asyncpipe_workers.models.weights import Linear, TransposedLinear
from asyncpipe_workers.newest import newest_attention

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this machine's choices are remembered, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    quickest._remembered.cache_clear()
    yield tmp_path / "asyncpipe" / "kernels.json"
    quickest._remembered.cache_clear()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", [PlainLinear, PackedLinear])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_float_form_gives_the_plain_product(form: type[PlainLinear], rows: int, has_bias: bool) -> None:
    weight, bias, x = numbers(48, 32), numbers(48, seed=1) if has_bias else None, numbers(rows, 32, seed=2)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(form(weight, bias)(x), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_lie_apart_are_one_product() -> None:
    weight, bias, x = numbers(48, 32), numbers(48, seed=1), numbers(5, 32, seed=2)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(Linear((weight[:7], weight[7:]), bias)(x), expected, rtol=1e-5, atol=1e-5)
    transposed = weight.t().contiguous()
    torch.testing.assert_close(TransposedLinear((transposed[:9], transposed[9:]), bias)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_is_near_and_a_rows_result_is_its_own(has_bias: bool, is_packed: bool) -> None:
    """An outlier in one row takes nothing from the others."""
    weight, bias, x = numbers(96, 64), numbers(96, seed=1) if has_bias else None, numbers(9, 64, seed=2)
    x[3] *= 1000
    linear = Int8Linear(RowCodec().encode(weight), 64, bias)
    if is_packed:
        linear.pack()
    found = linear(x)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert all(relative_error(found[row], expected[row]) < 0.02 for row in range(9))
    alone = torch.cat([linear(x[row : row + 1]) for row in range(9)])
    assert torch.equal(found, alone)


def test_no_rows_give_no_rows() -> None:
    """As when a step completes no prompt."""
    weight, nothing = numbers(96, 64), torch.empty(0, 64)
    codec = GroupCodec(64)
    forms = [PlainLinear(weight, None), PackedLinear(weight, None)]
    forms += [Int8Linear(RowCodec().encode(weight), 64, None), Int4Linear(codec, codec.encode(weight), 64, None)]
    assert [form(nothing).shape for form in forms] == [(0, 96)] * 4


def test_int8_of_nothing_is_the_bias() -> None:
    bias = numbers(16)
    linear = Int8Linear(RowCodec().encode(torch.zeros(16, 32)), 32, bias)
    assert torch.equal(linear(torch.zeros(2, 32)), bias.expand(2, 16))
    assert torch.isfinite(linear(numbers(2, 32))).all()


def test_int4_multiplies_what_its_codec_would_unpack() -> None:
    codec, weight, x = GroupCodec(64), numbers(96, 128), numbers(5, 128, seed=2)
    packed = codec.encode(weight)
    linear = Int4Linear(codec, packed, 128, None)
    expected = torch.nn.functional.linear(x, codec.decode(packed, 128, dtype=torch.float32))
    assert relative_error(linear(x), expected) < 0.01  # bfloat16


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("piece_bytes", [1, 128 * 64, int4.PIECE_BYTES])
@pytest.mark.parametrize("num_rows", [16, 64, 208, 256])
def test_int4_lies_as_torch_lays_it_out(
    num_rows: int, piece_bytes: int, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces as in one."""
    codec = GroupCodec(64)
    packed = codec.encode(numbers(num_rows, 128))
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codec.codes(packed, 128).codes_RN.int(), 1)
    monkeypatch.setattr(int4, "PIECE_BYTES", piece_bytes)
    if not is_known:
        monkeypatch.setattr(int4, "layout_is_known", lambda: False)
    assert torch.equal(int4.lay_out(codec.code_pairs(packed, 128)), expected)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="other kernels want other layouts")
def test_int4s_layout_is_known_where_it_should_be() -> None:
    assert int4.layout_is_known()


@pytest.mark.parametrize("shape", [(90, 128), (96, 100)])
def test_int4_of_shapes_that_its_kernel_lacks_is_computed_in_int8(shape: tuple[int, int]) -> None:
    weight, x = numbers(*shape), numbers(5, shape[1], seed=2)
    found = QuantizedLinears(GroupCodec(64), CPU, torch.float32)(weight, None)(x)
    assert relative_error(found, torch.nn.functional.linear(x, weight)) < 0.1


@pytest.mark.parametrize("rows", [0, 1, 9, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_is_the_same_before_and_after_packing(rows: int, has_bias: bool) -> None:
    weight, bias, x = numbers(96, 64), numbers(96, seed=1) if has_bias else None, numbers(rows, 64, seed=2)
    linear = Int8Linear(RowCodec().encode(weight), 64, bias)
    before = linear(x)
    linear.pack()
    assert (linear._codes_IO is None) == packed_sums_are_exact()
    assert torch.equal(linear(x), before)


def test_int8_is_exact_for_the_largest_sums() -> None:
    """Which do not fit into 16 bits: without VNNI there is no packed form, for its kernel would cut them off."""
    linear, x = Int8Linear(RowCodec().encode(torch.full((16, 64), 127.0)), 64, None), torch.full((40, 64), 127.0)
    expected = torch.full((40, 16), 64 * 127.0**2)
    assert torch.equal(linear(x), expected)
    linear.pack()
    assert torch.equal(linear(x), expected)


def test_int8_is_not_packed_where_sums_would_be_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    linear = Int8Linear(RowCodec().encode(numbers(96, 64)), 64, None)
    linear.pack()
    assert linear._codes_IO is not None
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert packed_sums_are_exact()


def test_int8_may_be_packed_while_it_multiplies() -> None:
    x = numbers(4, 256, seed=2)
    linears = [Int8Linear(RowCodec().encode(numbers(512, 256, seed=seed)), 256, None) for seed in range(20)]
    expected = [linear(x) for linear in linears]
    thread = threading.Thread(target=pack_all, args=(linears, threading.Event()))
    thread.start()
    while thread.is_alive():
        assert all(torch.equal(linear(x), y) for linear, y in zip(linears, expected, strict=True))
    assert all(torch.equal(linear(x), y) for linear, y in zip(linears, expected, strict=True))


def test_packing_stops_when_it_is_told_to() -> None:
    linears, stop = [Int8Linear(RowCodec().encode(numbers(96, 64)), 64, None)], threading.Event()
    stop.set()
    thread = threading.Thread(target=pack_all, args=(linears, stop))
    thread.start()
    thread.join()
    assert linears[0]._codes_IO is not None


def test_the_quickest_form_is_measured_once_for_this_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "weight_first_is_faster", lambda dtype: False)  # which is remembered beside it
    made: list[str] = []

    class Slow(PlainLinear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            made.append("slow")
            time.sleep(0.02)  # longer than a busy machine takes for the others
            return super().__call__(x)

    class Broken(PlainLinear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not on this processor")

    forms = {"slow": Slow, "broken": Broken, "plain": PlainLinear}
    makers = {name: partial(form, numbers(256, 256), None) for name, form in forms.items()}
    assert quickest_form("form", makers, (256, 256), torch.float32) == "plain"
    (choices,) = json.loads(cache.read_text()).values()
    assert list(choices.values()) == ["plain"]
    made.clear()
    quickest._remembered.cache_clear()  # as at the next start
    assert quickest_form("form", makers, (256, 256), torch.float32) == "plain"
    assert not made


def test_forms_that_are_compared_take_turns(cache: Path) -> None:
    """So that whoever else computes here for a moment disturbs all of them."""
    called: list[str] = []

    def calls(name: str) -> list[Callable[[], torch.Tensor]]:
        return [lambda: called.append(name) or torch.zeros(1)]

    assert quickest.quickest("work", {name: partial(calls, name) for name in "abc"}) in ("a", "b", "c")
    assert called == list("abc") * (1 + quickest.ROUNDS)


@pytest.mark.parametrize(("min_gain", "best"), [(0.9, "second"), (0.2, "first")])
def test_the_first_form_is_preferred_where_others_gain_little(cache: Path, min_gain: float, best: str) -> None:
    def lasts(seconds: float) -> list[Callable[[], torch.Tensor]]:
        return [lambda: time.sleep(seconds) or torch.zeros(1)]

    ways = {"first": partial(lasts, 0.004), "second": partial(lasts, 0.002)}
    assert quickest.quickest("work", ways, min_gain=min_gain) == best


@pytest.mark.parametrize("other", ["cpu family : 25\nmodel : 2", "cpu family : 26\nmodel : 17", ""])
def test_processors_that_are_called_the_same_are_told_apart(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As virtual machines do with "AMD EPYC"."""

    def machine(fields: str) -> str:
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nmodel name : AMD EPYC\n{fields}\n\n")
        return quickest._machine.__wrapped__()

    assert machine("cpu family : 26\nmodel : 2") != machine(other)


def test_of_a_large_weight_a_part_is_compared(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of millions would take seconds, and as much memory again."""
    tried: list[int] = []

    class Form(PlainLinear):
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            tried.append(len(weight))
            super().__init__(weight, bias)

    monkeypatch.setattr(kernels, "TRIED_NUMBERS", 64 * 1000)
    monkeypatch.setattr(kernels, "TRIED_OUTPUTS_PER_THREAD", 1)
    linears = FloatLinears(torch.float32)
    monkeypatch.setattr(linears, "forms", lambda stored: {"one": Form, "other": Form})
    linears(numbers(10_000, 64), None)
    assert tried == [1000, 1000, 10_000]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("linears", "attention", "compiler"):
        monkeypatch.setitem(sys.modules, f"asyncpipe_workers.compiled.{module}", None)
    newest_attention.cache_clear()  # it may have looked for one already
    yield
    newest_attention.cache_clear()


@pytest.mark.usefixtures("cache", "no_compiler")
def test_without_a_compiler_there_are_torchs_forms_and_products() -> None:
    assert list(FloatLinears(torch.float32).forms(torch.float16)) == ["plain", "packed"]
    assert list(packed_forms(RowCodec(), CPU)) == list(packed_forms(GroupCodec(64), CPU)) == ["torch"]
    assert newest_attention(shared=1, size=64, softcap=None, kept=torch.float32) is None
    weight, x = numbers(96, 64), numbers(5, 64, seed=2)
    for codec in (RowCodec(), GroupCodec(64)):
        found = QuantizedLinears(codec, CPU, torch.float32)(weight, None)(x)
        assert relative_error(found, torch.nn.functional.linear(x, weight)) < 0.1


def test_a_form_that_is_not_for_some_numbers_leaves_them_to_others(cache: Path) -> None:
    """Steps that float16 cannot hold."""
    weight, x = numbers(96, 64), numbers(5, 64, seed=2)
    weight[3, 5] = 3e6
    linear = QuantizedLinears(GroupCodec(64), CPU, torch.float32)(weight, None)
    assert isinstance(linear, Int4Linear)
    assert torch.isfinite(linear(x)).all()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("stored", "dtype"), [both for both in itertools.product(DTYPES, DTYPES) if fits(*both)])
@pytest.mark.parametrize("best", ["plain", "packed", "compiled"])
def test_weights_in_fewer_bits_are_the_same_numbers(
    stored: torch.dtype, dtype: torch.dtype, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever form, where a form is for these types."""
    linears = FloatLinears(dtype)
    if best not in linears.forms(stored):
        pytest.skip("no kernels are compiled here")
    monkeypatch.setattr(kernels, "quickest_form", lambda *_: best)
    weight, bias, x = numbers(96, 64).to(stored), numbers(96, seed=1).to(dtype), numbers(5, 64, seed=2).to(dtype)
    try:
        found = linears(weight, bias)(x)
    except RuntimeError as error:  # which is why it would not have been chosen
        pytest.skip(str(error))
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    assert found.dtype == dtype
    assert relative_error(found.float(), expected) < torch.finfo(dtype).eps * (10 if dtype == torch.float32 else 1)


def test_a_damaged_memory_of_choices_is_measured_anew(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text('{"a": [1]}')
    assert quickest_form("form", {"plain": partial(PlainLinear, numbers(16, 16), None)}, (16, 16), torch.float32) == "plain"
    assert "plain" in cache.read_text()
