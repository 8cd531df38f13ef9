"""Kernels that are not for CPUs, or that are less particular there."""

from __future__ import annotations

import torch

MIDDLE_CODE = 8  # of four bits


def int_mm(x_RI: torch.Tensor, weight_IO: torch.Tensor) -> torch.Tensor:
    if len(x_RI) <= 16 or x_RI.shape[1] % 8 or weight_IO.shape[1] % 8:
        raise RuntimeError(f"_int_mm of ({list(x_RI.shape)}, {list(weight_IO.shape)}): more than 16 rows, and multiples of 8")
    return torch._int_mm(x_RI, weight_IO)


def convert_weight_to_int4pack(pairs_OP: torch.Tensor, inner_tiles: int) -> torch.Tensor:
    """Of pairs of codes, the even one in the high half; the shape is that of tensor cores' tiles, the order is not."""
    num_outputs, num_pairs = pairs_OP.shape
    tile = 16 * inner_tiles
    if pairs_OP.dtype != torch.uint8 or num_outputs % 8 or 2 * num_pairs % tile:
        raise RuntimeError(f"_convert_weight_to_int4pack of {pairs_OP.dtype} {list(pairs_OP.shape)} for {inner_tiles} tiles")
    return pairs_OP.contiguous().view(torch.int32).view(num_outputs // 8, 2 * num_pairs // tile, 32, inner_tiles // 2).clone()


def weight_int4pack_mm(
    x_RI: torch.Tensor, packed: torch.Tensor, group_size: int, scales_zeros_GO2: torch.Tensor
) -> torch.Tensor:
    if x_RI.dtype != torch.bfloat16 or scales_zeros_GO2.dtype != torch.bfloat16:
        raise RuntimeError("_weight_int4pack_mm multiplies bfloat16")
    pairs_OP = packed.view(torch.uint8).view(packed.shape[0] * 8, -1)
    codes_OI = torch.stack([pairs_OP >> 4, pairs_OP & 15], dim=-1).flatten(1)
    scales_OI, zeros_OI = (each.t().repeat_interleave(group_size, dim=1).float() for each in scales_zeros_GO2.unbind(-1))
    weight_OI = (codes_OI.float() - MIDDLE_CODE) * scales_OI + zeros_OI
    return torch.nn.functional.linear(x_RI, weight_OI.bfloat16())


KERNELS = {
    "aten::_int_mm": int_mm,
    "aten::_convert_weight_to_int4pack": convert_weight_to_int4pack,
    "aten::_weight_int4pack_mm": weight_int4pack_mm,
}
