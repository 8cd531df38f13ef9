"""The 4-bit codec against a slow one that follows its description number by number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncpipe.errors import Invalid
from asyncpipe.policy import Compression
from asyncpipe_workers.memory import quantization
from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GROUP_SIZES = [32, 64, 128]
SIZES = [1, 63, 64, 65, 80, 128, 200]
CODE_PAIRS = bytes.fromhex("0123456789abcdef")  # 0, 1, ... 15


def oracle_encode(row: list[float], group_size: int) -> bytes:
    codes, kept = b"", b""
    with np.errstate(all="ignore"):
        for start in range(0, len(row), group_size):
            group = [np.float32(x) for x in row[start : start + group_size]]
            group += [np.float32(0)] * (group_size - len(group))
            low, high = min(group), max(group)
            scale = np.float32(15) / (high - low)
            q = [0 if np.isinf(scale) else round(min(max(float((x - low) * scale), 0.0), 15.0)) for x in group]
            codes += bytes(q[i] << 4 | q[i + 1] for i in range(0, group_size, 2))
            kept += np.array([scale, low]).astype("<f2").tobytes()
    return codes + kept


def oracle_decode(packed: bytes, size: int, group_size: int) -> list[float]:
    num_groups = math.ceil(size / group_size)
    kept = np.frombuffer(packed[num_groups * group_size // 2 :], "<f2").astype(np.float32)
    numbers = []
    for i in range(size):
        code = packed[i // 2] & 15 if i % 2 else packed[i // 2] >> 4
        scale, low = kept[i // group_size * 2], kept[i // group_size * 2 + 1]
        numbers.append(float(np.float32(code) / scale + low))
    return numbers


def oracle_decoded(packed: torch.Tensor, size: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([oracle_decode(bytes(row.tolist()), size, group_size) for row in packed]).to(dtype)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers_of_many_sizes(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that differ in range and offset; the first one's scale is beyond float16, the last one is constant."""
    rows = numbers(5, size) * torch.tensor([1e-5, 0.02, 1.0, 1000.0, 0.0])[:, None]
    return (rows + torch.tensor([0.25, 0.0, -3.0, 500.0, 7.0])[:, None]).to(dtype)


def random_packed(codec: GroupCodec, rows: int, size: int) -> torch.Tensor:
    """Any codes with any scale from 2^-6 to 2^6."""
    generator = torch.Generator().manual_seed(size)
    packed = torch.randint(0, 256, (rows, codec.packed_size(size)), dtype=torch.uint8, generator=generator)
    num_groups = math.ceil(size / codec.group_size)
    scales = 2 ** (12 * torch.rand(rows, num_groups, generator=generator) - 6)
    lows = torch.randn(rows, num_groups, generator=generator)
    kept = torch.stack([scales, lows], dim=-1).to(torch.float16).flatten(1).view(torch.uint8)
    packed[:, packed.shape[1] - kept.shape[1] :] = kept
    return packed


def round_trip(x: torch.Tensor, *, group_size: int = 64) -> torch.Tensor:
    codec = GroupCodec(group_size)
    return codec.decode(codec.encode(x), x.shape[-1], dtype=x.dtype)


def test_a_group_worked_by_hand() -> None:
    packed = GroupCodec(group_size=16).encode(torch.arange(16.0) + 2)
    assert bytes(packed.tolist()) == CODE_PAIRS + bytes.fromhex("003c 0040")  # 1.0 and 2.0


@pytest.mark.parametrize(("size", "num_bytes"), [(0, 0), (1, 36), (64, 36), (65, 72), (80, 72), (2048, 1152)])
def test_rows_have_the_size_that_was_told(size: int, num_bytes: int) -> None:
    codec = GroupCodec()
    assert codec.packed_size(size) == num_bytes
    assert codec.encode(numbers(2, 3, size)).shape == (2, 3, num_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_equal_the_description(size: int, group_size: int, dtype: torch.dtype) -> None:
    x = numbers_of_many_sizes(size, dtype)
    packed = GroupCodec(group_size).encode(x)
    assert [bytes(row.tolist()) for row in packed] == [oracle_encode(row.tolist(), group_size) for row in x]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, 2, 66])
@pytest.mark.parametrize("size", SIZES)
def test_numbers_equal_the_description(size: int, group_size: int, dtype: torch.dtype) -> None:
    codec = GroupCodec(group_size)
    packed = random_packed(codec, 3, size)
    decoded = codec.decode(packed, size, dtype=dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, oracle_decoded(packed, size, group_size, dtype))


def test_a_scale_is_a_quotient() -> None:
    """The middle of a range tells: 15 times a reciprocal rounds to the other code for one range in five."""
    ranges = torch.arange(1.0, 400.0)[:, None]
    x = torch.cat([torch.zeros_like(ranges), ranges / 2, ranges, ranges], dim=1)
    packed = GroupCodec(group_size=4).encode(x)
    assert [bytes(row.tolist()) for row in packed] == [oracle_encode(row.tolist(), 4) for row in x]


def test_a_code_is_divided_by_its_scale() -> None:
    """A product with the reciprocal is off by a bit for some scales; a table of all normal ones tells."""
    codec = GroupCodec(group_size=16)
    scales = torch.arange(0x0400, 0x7C00, dtype=torch.int16)[:, None]
    codes = torch.tensor(list(CODE_PAIRS), dtype=torch.uint8).expand(len(scales), 8)
    packed = torch.cat([codes, scales.view(torch.uint8), torch.zeros_like(scales).view(torch.uint8)], dim=1)
    expected = np.arange(16, dtype=np.float32) / scales.view(torch.float16).to(torch.float32).numpy()
    assert np.array_equal(codec.decode(packed, 16, dtype=torch.float32).numpy(), expected)


@pytest.mark.parametrize(("group_size", "expected"), [(32, 0.0783), (64, 0.0896), (128, 0.0998)])
def test_error_on_normal_numbers_is_that_of_flexllmgen(group_size: int, expected: float) -> None:
    x = numbers(256, 1024)
    error = (round_trip(x, group_size=group_size) - x).square().mean() / x.square().mean()
    assert error.sqrt().item() == pytest.approx(expected, rel=0.02)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    row=st.lists(st.floats(-60_000, 60_000, width=32), min_size=1, max_size=130),
    group_size=st.sampled_from([2, 16, 64]),
)
def test_each_number_is_within_half_a_step(row: list[float], group_size: int) -> None:
    decoded = round_trip(torch.tensor(row), group_size=group_size).tolist()
    for start in range(0, len(row), group_size):
        group = row[start : start + group_size]
        padded = [*group, 0.0] if len(group) < group_size else group
        low, spread = min(padded), max(padded) - min(padded)
        half_step = spread / 30 if spread > 2.3e-4 else spread
        rounding = (abs(low) + spread) * (2**-11 + 2**-20) + 2**-25  # of float16, and a little for float32
        for x, y in zip(group, decoded[start : start + group_size], strict=True):
            assert abs(x - y) <= half_step + rounding


@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 65504.0, 2.0**-24])
def test_a_constant_group_is_exact(value: float) -> None:
    x = torch.full((3, 128), value)
    packed = GroupCodec().encode(x)
    assert not packed[:, :64].any()
    assert torch.equal(GroupCodec().decode(packed, 128, dtype=torch.float32), x)


@pytest.mark.parametrize("spread", [1e-45, 1e-38, 1e-20, 2.2e-4])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_tiny_range_becomes_its_minimum(low: float, spread: float) -> None:
    x = torch.full((1, 64), low)
    x[0, 1::2] += spread
    assert torch.equal(round_trip(x), torch.full((1, 64), low))


def test_a_range_whose_scale_is_beyond_float32_has_codes_of_zero() -> None:
    packed = GroupCodec(group_size=2).encode(torch.tensor([0.0, 1e-38]))
    assert bytes(packed.tolist()) == bytes.fromhex("00 007c 0000")


def test_a_range_just_above_that_has_steps() -> None:
    x = torch.linspace(0, 2.4e-4, 64)
    assert torch.allclose(round_trip(x), x, rtol=0, atol=2.4e-4 / 30 + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [40, 64])
def test_huge_numbers_are_cut_and_stay_finite(size: int, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    rows = [[most, -most], [most, most / 2], [-most, -most], [1e30, 0.0], [1e5, 1e5]]
    x = torch.tensor(rows).repeat(1, size // 2).to(dtype)
    decoded = GroupCodec().decode(GroupCodec().encode(x), size, dtype=torch.float32)
    assert decoded.isfinite().all()
    assert decoded[0, :2].tolist() == [15 * 2**24 - 65504, -65504]
    assert decoded[3, :2].tolist() == [15 * 2**24, 0]
    assert decoded[2, 0] == -65504 or size == 40  # where padding is the maximum
    if size == 64:
        assert decoded[4, 0] == 65504


def test_a_range_above_that_of_float16_keeps_its_steps() -> None:
    x = torch.linspace(0, 3e6, 64)
    assert torch.allclose(round_trip(x), x, rtol=0, atol=3e6 / 30 + 3e6 * 2**-7)  # the scale has 7 bits left


def test_a_group_with_a_nan_is_nan_and_no_other() -> None:
    x = numbers(2, 128)
    x[0, 70] = math.nan
    nans = round_trip(x).isnan()
    assert nans[0, 64:].all()
    assert nans.sum() == 64


def test_each_row_can_be_read_alone() -> None:
    codec, x = GroupCodec(), numbers(9, 200)
    packed = codec.encode(x)
    decoded = codec.decode(packed, 200, dtype=torch.float32)
    for first in range(9):
        for end in range(first, 10):
            assert torch.equal(codec.encode(x[first:end]), packed[first:end])
            assert torch.equal(codec.decode(packed[first:end], 200, dtype=torch.float32), decoded[first:end])
    assert torch.equal(codec.decode(packed[4], 200, dtype=torch.float32), decoded[4])


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("most_numbers", [1, 256, 400, 1500])
def test_pieces_are_the_whole(most_numbers: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = GroupCodec(), numbers(3, 5, 7, size).transpose(0, 2)
    packed = codec.encode(x)
    decoded = codec.decode(packed, size, dtype=torch.float32)
    monkeypatch.setattr(quantization, "CPU_PIECE", most_numbers)
    assert torch.equal(codec.encode(x), packed)
    assert torch.equal(codec.decode(packed, size, dtype=torch.float32), decoded)


def test_no_piece_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    encode = GroupCodec._encode

    def spied(codec: GroupCodec, x: torch.Tensor, packed: torch.Tensor) -> None:
        sizes.append(x.shape[:-1].numel())
        encode(codec, x, packed)

    monkeypatch.setattr(quantization, "CPU_PIECE", 640)  # 10 rows of a group
    monkeypatch.setattr(GroupCodec, "_encode", spied)
    GroupCodec().encode(numbers(2, 4, 3, 2))
    assert sizes == [9, 3, 9, 3]
    sizes.clear()
    GroupCodec().encode(numbers(11, 2))
    assert sizes == [10, 1]


@pytest.mark.parametrize("offset", [0, 1, 2, 6, 7])
@pytest.mark.parametrize("gap", [0, 1, 10])
@pytest.mark.parametrize("group_size", [2, 64])
def test_packed_rows_may_lie_anywhere(offset: int, gap: int, group_size: int) -> None:
    codec = GroupCodec(group_size)
    packed = codec.encode(numbers(4, 3, 80))
    pitch = packed.shape[-1] + gap
    buffer = torch.full((offset + 12 * pitch,), 255, dtype=torch.uint8)
    view = buffer[offset:].view(4, 3, pitch)[..., : packed.shape[-1]]
    view.copy_(packed)
    for packed_view, original in [(view, packed), (view.transpose(0, 1), packed.transpose(0, 1)), (view[1, 2], packed[1, 2])]:
        decoded = codec.decode(packed_view, 80, dtype=torch.float32)
        assert torch.equal(decoded, codec.decode(original.clone(), 80, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 80])
def test_numbers_are_written_where_the_caller_says(size: int, dtype: torch.dtype) -> None:
    codec, x = GroupCodec(), numbers(3, size)
    packed = codec.encode(x)
    buffer = torch.full((5, size), math.nan, dtype=dtype)
    decoded = codec.decode(packed, size, dtype=dtype, out=buffer[1:4])
    assert decoded.data_ptr() == buffer[1:4].data_ptr()
    assert torch.equal(buffer[1:4], codec.decode(packed, size, dtype=dtype))
    assert buffer[[0, 4]].isnan().all()


def test_the_input_is_only_read() -> None:
    x = numbers(3, 80).requires_grad_()
    before = x.detach().clone()
    packed = GroupCodec().encode(x)
    packed_before = packed.clone()
    GroupCodec().decode(packed, 80, dtype=torch.float32)
    assert torch.equal(x, before)
    assert torch.equal(packed, packed_before)


@pytest.mark.parametrize("size", [64, 80, 128])
def test_input_of_any_strides_gives_the_same_bytes(size: int) -> None:
    x = numbers(size, 6, 4)
    turned = x.permute(2, 1, 0)
    assert torch.equal(GroupCodec().encode(turned), GroupCodec().encode(turned.contiguous()))


@pytest.mark.parametrize("shape", [(0, 80), (3, 0), (2, 0, 80)])
def test_nothing_becomes_nothing(shape: tuple[int, ...]) -> None:
    assert round_trip(numbers(*shape)).shape == shape


@pytest.mark.parametrize("x", [torch.arange(64), torch.tensor(1.0), torch.zeros(64, dtype=torch.bool)])
def test_only_rows_of_floating_point_numbers_are_encoded(x: torch.Tensor) -> None:
    with pytest.raises(Invalid, match="give rows of floating-point numbers"):
        GroupCodec().encode(x)


@pytest.mark.parametrize(
    ("packed", "size"),
    [
        (torch.zeros(2, 36, dtype=torch.uint8), 65),
        (torch.zeros(2, 37, dtype=torch.uint8), 64),
        (torch.zeros(2, 36, dtype=torch.int8), 64),
        (torch.zeros((), dtype=torch.uint8), 64),
        (torch.zeros(2, 0, dtype=torch.uint8), -1),
    ],
)
def test_only_packed_rows_of_that_size_are_decoded(packed: torch.Tensor, size: int) -> None:
    with pytest.raises(Invalid, match="is no packed rows of"):
        GroupCodec().decode(packed, size, dtype=torch.float32)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(2, 63),
        torch.zeros(3, 64),
        torch.zeros(2, 64, dtype=torch.float16),
        torch.zeros(64, 2).T,
        torch.zeros(2, 64, device="meta"),
    ],
)
def test_numbers_are_not_written_where_they_do_not_fit(out: torch.Tensor) -> None:
    with pytest.raises(Invalid, match="must be contiguous, of shape"):
        GroupCodec().decode(torch.zeros(2, 36, dtype=torch.uint8), 64, dtype=torch.float32, out=out)


def test_numbers_are_not_decoded_to_integers() -> None:
    with pytest.raises(Invalid, match="use a floating-point type"):
        GroupCodec().decode(torch.zeros(2, 36, dtype=torch.uint8), 64, dtype=torch.int32)


@pytest.mark.parametrize("group_size", [-2, 0, 1, 63])
def test_a_group_has_an_even_number_of_numbers(group_size: int) -> None:
    with pytest.raises(Invalid, match="use an even number"):
        GroupCodec(group_size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 80, 2048])
def test_cuda_gives_the_bytes_and_numbers_of_the_cpu(size: int, dtype: torch.dtype) -> None:
    codec = GroupCodec()
    x = torch.cat([numbers(500, size).to(dtype), numbers_of_many_sizes(size, dtype)])
    packed = codec.encode(x)
    assert torch.equal(codec.encode(x.cuda()).cpu(), packed)
    assert torch.equal(codec.decode(packed.cuda(), size, dtype=dtype).cpu(), codec.decode(packed, size, dtype=dtype))


@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 70),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 1000),
)
def test_eight_bits_are_off_by_half_a_step_at_most(rows: int, size: int, magnitude: float, seed: int) -> None:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * magnitude
    codec = RowCodec()
    packed = codec.encode(x)
    assert packed.shape == (rows, codec.packed_size(size)) == (rows, Compression(num_bits=8).packed_bytes(size))
    steps = x.abs().amax(1, keepdim=True) / 127
    assert ((codec.decode(packed, size, dtype=torch.float32) - x).abs() <= 0.501 * steps).all()
    again = codec.encode(codec.decode(packed, size, dtype=torch.float32))
    assert torch.equal(again[:, :size], packed[:, :size])
