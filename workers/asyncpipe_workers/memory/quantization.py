"""Numbers in four and in eight bits.

`GroupCodec` is FlexLLMGen's group-wise codec (Sheng et al. 2023, "FlexGen: High-Throughput Generative Inference of
Large Language Models with a Single GPU").

The last dimension is grouped and padded with zeros to whole groups. A group of minimum mn and maximum mx has the scale
15 / (mx - mn); the code of x is round((x - mn) * scale), 0 to 15, in float32. Scale and minimum are kept as float16, and a code
is read as code / scale + mn in float32.

A row of bytes holds the codes, two to a byte, the even one in the high half; then the scale and minimum of each group,
little-endian. So a row can be read without any other.

`RowCodec` is for eight bits: a row's scale s is its largest magnitude / 127, the code of x round(x / s); a row of bytes holds
the codes, signed, then s in float32.

What float16 cannot hold: the scale of a range below 2.3e-4 is infinite, so that the group becomes its minimum, as a constant
group does; a minimum beyond +-65504 becomes +-65504, and a range above 2.5e8 becomes 2.5e8. So finite numbers stay finite (in
float32; float16 has no room above 65504). A group with a NaN becomes NaN.

Shapes: ... leading dimensions, N numbers of a row, G groups of a row, S numbers of a group, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from asyncpipe.errors import Invalid
from asyncpipe.policy import Compression

MAX_CODE = 15
MAX_ROW_CODE = 127
MIN_ROW_SCALE = torch.finfo(torch.float32).tiny
MAX_FLOAT16 = torch.finfo(torch.float16).max
MIN_FLOAT16 = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps  # subnormal
MAX_FLOAT32 = torch.finfo(torch.float32).max

# Numbers at a time. A CPU's caches should hold what lies between one operation and the next; for other devices the number is a
# bound on memory alone, and few large operations are best.
CPU_PIECE = 1 << 19
DEVICE_PIECE = 1 << 24


class Codec(Protocol):
    """Packs rows of numbers, on any device."""

    @property
    def compression(self) -> Compression: ...

    def packed_size(self, size: int) -> int:
        """Bytes of a row of `size` numbers."""
        ...

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N) of any floating-point type -> (..., B) uint8. Raises Invalid."""
        ...

    def decode(self, packed: torch.Tensor, size: int, *, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """(..., B) uint8 -> (..., N = `size`) of `dtype`, written to `out` if given. Raises Invalid."""
        ...


def make_codec(compression: Compression) -> Codec:
    return RowCodec() if compression.num_bits == 8 else GroupCodec(compression.group_size)


class RowCodes(NamedTuple):
    """Of rows in eight bits: x = codes * scales."""

    codes_RN: torch.Tensor  # int8
    scales_R: torch.Tensor  # float32


@dataclass(frozen=True, slots=True)
class RowCodec:
    """Eight bits, symmetric, a scale for each row."""

    @property
    def compression(self) -> Compression:
        return Compression(num_bits=8)

    def packed_size(self, size: int) -> int:
        return self.compression.packed_bytes(size)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        packed = torch.empty((*x.shape[:-1], self.packed_size(size)), dtype=torch.uint8, device=x.device)
        for piece, packed_piece in split_rows(x.detach(), packed, max(CPU_PIECE // max(size, 1), 1)):
            numbers = piece.to(torch.float32)
            scales_R1 = numbers.abs().amax(-1, keepdim=True).div_(MAX_ROW_CODE).clamp_(min=MIN_ROW_SCALE)
            codes = (numbers / scales_R1).round_().clamp_(-MAX_ROW_CODE, MAX_ROW_CODE)
            packed_piece[..., :size] = codes.to(torch.int8).view(torch.uint8)
            packed_piece[..., size:] = scales_R1.view(torch.uint8)
        return packed

    def decode(self, packed: torch.Tensor, size: int, *, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            out = torch.empty((*packed.shape[:-1], size), dtype=dtype, device=packed.device)
        for packed_piece, piece in split_rows(packed, out, max(CPU_PIECE // max(size, 1), 1)):
            codes, scales = self.codes(packed_piece, size)
            piece.copy_(codes.to(torch.float32).mul_(scales[..., None]))
        return out

    def codes(self, packed: torch.Tensor, size: int) -> RowCodes:
        """(..., B) uint8 -> (..., N), where they are, and (...)."""
        if packed.dtype != torch.uint8 or packed.shape[-1] != self.packed_size(size):
            raise Invalid(f"a tensor of {packed.dtype} and shape {tuple(packed.shape)} is no rows of {size} numbers in 8 bits")
        scales = packed[..., size:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return RowCodes(packed[..., :size].view(torch.int8), scales[..., 0])


class GroupCodes(NamedTuple):
    """Of rows in four bits: x = codes / scales + minima, the last two one for each group."""

    codes_RN: torch.Tensor  # uint8
    scales_RG: torch.Tensor  # float32
    minima_RG: torch.Tensor


@dataclass(frozen=True, slots=True)
class GroupCodec:
    """Packs rows of numbers, on any device. Raises Invalid."""

    group_size: int = 64

    def __post_init__(self) -> None:
        if self.group_size < 2 or self.group_size % 2:
            raise Invalid(f"groups of {self.group_size} numbers: use an even number, 2 or more")

    @property
    def compression(self) -> Compression:
        return Compression(num_bits=4, group_size=self.group_size)

    def codes(self, packed: torch.Tensor, size: int) -> GroupCodes:
        """(..., B) uint8 -> (..., padded N) and (..., G) twice."""
        kept = self.scales_minima(packed, size).to(torch.float32)
        return GroupCodes(halves_apart(self.code_pairs(packed, size)), kept[..., 0], kept[..., 1])

    def code_pairs(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        """(..., B) uint8 -> (..., padded N / 2), where they are: two codes a byte, the even one in the high half."""
        self._check_packed(packed, size)
        return packed[..., : self._code_bytes(size)]

    def scales_minima(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        """(..., B) uint8 -> (..., G, 2) float16, a copy: it is aligned, the row may not be."""
        self._check_packed(packed, size)
        kept = packed[..., self._code_bytes(size) :].clone(memory_format=torch.contiguous_format).view(torch.float16)
        return kept.view(*packed.shape[:-1], self._num_groups(size), 2)

    def packed_size(self, size: int) -> int:
        """Bytes of a row of `size` numbers."""
        return self.compression.packed_bytes(size)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N) of any floating-point type -> (..., B) uint8."""
        if not x.is_floating_point() or x.ndim == 0:
            raise Invalid(
                f"cannot quantize a tensor of {x.dtype} and shape {tuple(x.shape)}: give rows of floating-point numbers"
            )
        size = x.shape[-1]
        packed = torch.empty((*x.shape[:-1], self.packed_size(size)), dtype=torch.uint8, device=x.device)
        for piece, packed_piece in self._pieces(x.detach(), packed, size):
            self._encode(piece, packed_piece)
        return packed

    def decode(self, packed: torch.Tensor, size: int, *, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """(..., B) uint8 -> (..., N = `size`) of `dtype`, written to `out` if given (contiguous).

        `packed` may be any view, at any byte of its buffer. Give `out` where calls repeat: new memory takes longer to come by
        than numbers take to decode.
        """
        self._check_packed(packed, size)
        if not dtype.is_floating_point:
            raise Invalid(f"cannot decode to {dtype}: use a floating-point type")
        shape = (*packed.shape[:-1], size)
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=packed.device)
        elif out.shape != shape or out.dtype != dtype or out.device != packed.device or not out.is_contiguous():
            raise Invalid(
                f"cannot write numbers to a tensor of shape {tuple(out.shape)}, {out.dtype} on {out.device}:"
                f" it must be contiguous, of shape {shape}, {dtype} on {packed.device}"
            )
        for packed_piece, piece in self._pieces(packed, out, size):
            self._decode(packed_piece, piece)
        return out

    def _num_groups(self, size: int) -> int:
        return -(-size // self.group_size)

    def _code_bytes(self, size: int) -> int:
        return self._num_groups(size) * (self.group_size // 2)

    def _check_packed(self, packed: torch.Tensor, size: int) -> None:
        if size < 0 or packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != self.packed_size(size):
            raise Invalid(
                f"a tensor of {packed.dtype} and shape {tuple(packed.shape)} is no packed rows of {size} numbers:"
                f" these are uint8, {self.packed_size(size)} bytes a row in groups of {self.group_size}"
            )

    def _pieces(self, source: torch.Tensor, target: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        most_numbers = CPU_PIECE if source.device.type == "cpu" else DEVICE_PIECE
        padded_size = self._num_groups(size) * self.group_size
        return split_rows(source, target, max(most_numbers // max(padded_size, 1), 1))

    def _encode(self, x: torch.Tensor, packed: torch.Tensor) -> None:
        size = x.shape[-1]
        num_groups, code_bytes = self._num_groups(size), self._code_bytes(size)
        padded = F.pad(x.to(torch.float32), (0, num_groups * self.group_size - size))
        x_GS = padded.reshape(*x.shape[:-1], num_groups, self.group_size)
        low_G1, high_G1 = x_GS.amin(-1, keepdim=True), x_GS.amax(-1, keepdim=True)
        range_G1 = (high_G1 - low_G1).clamp_(max=MAX_FLOAT32)
        scale_G1 = torch.full_like(range_G1, MAX_CODE).div_(range_G1)  # 15 / tensor is 15 * its reciprocal, and off by a bit
        factor_G1 = scale_G1.masked_fill(scale_G1.isinf(), 0.0)
        codes_GS = (x_GS - low_G1).mul_(factor_G1).clamp_(0, MAX_CODE).round_()
        packed[..., :code_bytes] = _halves_joined(codes_GS.to(torch.uint8).flatten(-2))
        kept_G2 = torch.cat([scale_G1.clamp_(min=MIN_FLOAT16), low_G1.clamp_(-MAX_FLOAT16, MAX_FLOAT16)], dim=-1)
        packed[..., code_bytes:] = kept_G2.to(torch.float16).flatten(-2).view(torch.uint8)

    def _decode(self, packed: torch.Tensor, out: torch.Tensor) -> None:
        size = out.shape[-1]
        num_groups = self._num_groups(size)
        shape_GS = (*out.shape[:-1], num_groups, self.group_size)
        codes, scales_G, minima_G = self.codes(packed, size)
        codes_GS = codes.view(shape_GS)
        in_place = out.dtype == torch.float32 and size == num_groups * self.group_size
        x_GS = out.view(shape_GS).copy_(codes_GS) if in_place else codes_GS.to(torch.float32)
        x_GS.div_(scales_G[..., None]).add_(minima_G[..., None])
        if not in_place:
            out.copy_(x_GS.flatten(-2)[..., :size])


def _halves_joined(codes: torch.Tensor) -> torch.Tensor:
    """Pairs of codes, a byte each, to the low bytes of int16: the even code in the high half."""
    pairs = codes.contiguous().view(torch.int16)  # even + 256 * odd
    return (pairs << 4).bitwise_or_(pairs >> 8)


def halves_apart(packed: torch.Tensor) -> torch.Tensor:
    """Two codes of each byte to a byte each, in 16-bit arithmetic, which is several times as fast as interleaving bytes."""
    pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
    return (pairs >> 4).add_(pairs, alpha=256).bitwise_and_(0x0F0F).view(torch.uint8)


def split_rows(source: torch.Tensor, target: torch.Tensor, most_rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of both, of at most `most_rows` rows each, whatever their strides."""
    if not source.numel():
        return
    num_rows = source.shape[:-1].numel()
    if num_rows <= most_rows:
        yield source, target
    elif (inner_rows := num_rows // len(source)) > most_rows:
        for source_part, target_part in zip(source.unbind(), target.unbind(), strict=True):
            yield from split_rows(source_part, target_part, most_rows)
    else:
        most = most_rows // inner_rows
        yield from zip(torch.split(source, most), torch.split(target, most), strict=True)
