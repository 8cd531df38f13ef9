"""Products with weights in four bits, in groups along the inputs, by torch's kernels.

They are unpacked to bfloat16 in registers, which saves memory traffic and no arithmetic: for few rows.

A CPU's kernel wants 64 rows of the weight side by side: 32 bytes for each input, with the codes of rows r and r + 32 in one.
torch makes that of a 32-bit integer for each code, more slowly than codes can be read from disk. Here the bytes that hold two
codes of a row become it at once. Where torch makes something else, for a processor with another kernel, it is torch's.

Shapes: R rows, I inputs, O outputs, G groups, B bytes of a packed row, P pairs of codes, a byte each.
"""

from __future__ import annotations

import functools
import math

import torch

from asyncpipe_workers.memory.quantization import GroupCodec, halves_apart, split_rows

GROUPS = (32, 64, 128, 256)  # that the kernels know
OUTPUTS = 16  # they work on so many rows of the weight at once
BLOCK = 64  # rows of the weight that lie together in a CPU's layout
PIECE_BYTES = 1 << 20  # that are laid out at once, in a core's cache
INNER_TILES = 8  # of 16 inputs, side by side in a GPU's layout
MIDDLE_CODE = 8  # of the kernels: codes are 0 to 15, and mean code - 8


class Int4Linear:
    """`packed` (O, B) is of `codec`. Raises NotImplementedError for shapes that torch has no kernel for."""

    def __init__(self, codec: GroupCodec, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        if not _fits(codec, len(packed), in_size, device=packed.device):
            raise NotImplementedError(f"torch has no kernel for ({len(packed)}, {in_size}) in groups of {codec.group_size}")
        pairs_OP = codec.code_pairs(packed, in_size)
        if packed.device.type == "cpu":
            self._weight = lay_out(pairs_OP)
            self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            self._weight = torch.ops.aten._convert_weight_to_int4pack(pairs_OP.contiguous(), INNER_TILES)
            self._multiply = torch.ops.aten._weight_int4pack_mm
        self._scales_zeros_GO2 = _scales_zeros(codec.scales_minima(packed, in_size))
        self._group_size = codec.group_size
        self._out_size = len(packed)
        self._bias = bias
        self.num_bytes = packed.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self._out_size)
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y: torch.Tensor = self._multiply(rows, self._weight, self._group_size, self._scales_zeros_GO2)
        y = y.view(*x.shape[:-1], self._out_size).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)


def _fits(codec: GroupCodec, out_size: int, in_size: int, *, device: torch.device) -> bool:
    multiple = codec.group_size if device.type == "cpu" else math.lcm(codec.group_size, 16 * INNER_TILES)
    return codec.group_size in GROUPS and in_size % multiple == 0 and out_size % OUTPUTS == 0


def _scales_zeros(scales_minima_OG2: torch.Tensor) -> torch.Tensor:
    """(G, O, 2) bfloat16: x = (code - middle) * scale + zero, where a codec has x = code / scale + minimum."""
    pairs_GO2 = scales_minima_OG2.transpose(0, 1).contiguous().float()
    steps_GO = pairs_GO2[..., 0].reciprocal_()
    pairs_GO2[..., 1].add_(steps_GO, alpha=MIDDLE_CODE)
    return pairs_GO2.bfloat16()


def lay_out(pairs_OP: torch.Tensor) -> torch.Tensor:
    """(O, P) uint8 as a CPU's kernel wants it, of pairs of codes (the even one in the high half)."""
    num_rows, num_pairs = pairs_OP.shape
    num_known = num_rows // BLOCK * BLOCK if layout_is_known() else 0  # rows; the last block may be smaller, and lies otherwise
    laid_out_OP = torch.empty(pairs_OP.shape, dtype=torch.uint8)
    step = max(PIECE_BYTES // num_pairs // BLOCK, 1) * BLOCK
    for pairs_RP, out_RP in split_rows(pairs_OP[:num_known], laid_out_OP[:num_known], step):
        _interleave(pairs_RP, out=out_RP)
    for pairs_RP, out_RP in split_rows(pairs_OP[num_known:], laid_out_OP[num_known:], step):
        out_RP.copy_(_by_torch(pairs_RP))
    return laid_out_OP


@functools.cache
def layout_is_known() -> bool:
    """Whether torch makes the same of some codes."""
    pairs_OP = torch.arange(BLOCK * 32).mul_(37).to(torch.uint8).view(BLOCK, 32)
    found_OP = torch.empty_like(pairs_OP)
    _interleave(pairs_OP, out=found_OP)
    return torch.equal(found_OP, _by_torch(pairs_OP))


def _by_torch(pairs_OP: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(halves_apart(pairs_OP).int(), 1)
    return packed.view(pairs_OP.shape)


def _interleave(pairs_RP: torch.Tensor, *, out: torch.Tensor) -> None:
    """Of whole blocks. In each, for one pair of inputs after the other: the even one's codes, then the odd one's."""
    first_NRP, second_NRP = pairs_RP.view(-1, 2, BLOCK // 2, pairs_RP.shape[1]).unbind(1)
    even_NRP = (first_NRP >> 4).bitwise_or_(second_NRP & 0xF0)
    odd_NRP = (first_NRP & 0x0F).bitwise_or_(second_NRP << 4)
    both_NPR = out.view(len(even_NRP), -1, 2, BLOCK // 2)
    both_NPR[:, :, 0] = even_NRP.transpose(1, 2)
    both_NPR[:, :, 1] = odd_NRP.transpose(1, 2)
