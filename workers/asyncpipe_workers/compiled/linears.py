"""y = x W^T + b by compiled products.

Shapes: R rows, I inputs, O outputs, C outputs of a panel, P panels, W words of a row, B bytes of a packed row, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from asyncpipe_workers.compiled.compiler import CompiledKernel, compiled, first_compiled
from asyncpipe_workers.compiled.int4_product import UNROLLED, WORD_INPUTS, Int4Product, WidenedInt4Product, panel_size
from asyncpipe_workers.compiled.panels import LayOutPanels
from asyncpipe_workers.compiled.product import code_bytes
from asyncpipe_workers.compiled.products import (
    FEWEST_LANES,
    BFloat16Product,
    Float16Product,
    FloatProduct,
    Int8Product,
    WidenedInt8Product,
    moved_bytes,
)
from asyncpipe_workers.compiled.widened_rows import sums_bytes
from asyncpipe_workers.memory.quantization import MAX_FLOAT16, GroupCodec, RowCodec
from asyncpipe_workers.tape import new_tensor

FLOAT_PRODUCTS = {torch.float32: FloatProduct, torch.float16: Float16Product, torch.bfloat16: BFloat16Product}
INT8_PRODUCTS = (Int8Product, WidenedInt8Product)  # the first for which the processor has the instructions
INT4_PRODUCTS = (Int4Product, WidenedInt4Product)


class CompiledLinear:
    """(..., I) to (..., O), whose rows may lie apart."""

    def __init__(
        self,
        product: CompiledKernel,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor,
        *,
        row_bytes: int,
        scratch_bytes: Callable[[int, int], int],
    ) -> None:
        """`weight`, `scales` and `bias` (float32) are as the product takes them, and kept. `scratch_bytes` are for so many rows
        of so many inputs."""
        self._product = product
        self._weight = weight
        self._scales = scales
        self._bias = bias
        self._row_bytes = row_bytes
        self._out_size = self._product_size = len(bias)
        self._scratch_bytes = scratch_bytes
        self.num_bytes = weight.nbytes + scales.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 2 or x.dtype != torch.float32:  # a look costs less than calls that change nothing
            return self(x.reshape(-1, x.shape[-1]).float()).reshape(*x.shape[:-1], self._out_size).to(x.dtype)
        num_rows, in_size = x.shape
        y_RO = new_tensor(num_rows, self._product_size)
        scratch = new_tensor(self._scratch_bytes(num_rows, in_size), dtype=torch.uint8)
        tensors = (x.contiguous(), y_RO, self._weight, self._scales, self._bias, scratch)
        self._product(tensors, (num_rows, in_size, self._product_size, self._row_bytes))
        return y_RO if self._product_size == self._out_size else y_RO[:, : self._out_size]


class CompiledFloatLinear(CompiledLinear):
    """`weight` (O, I) is kept as it is, in the type that it has; sums are of float32. Raises NotImplementedError where there
    is no such product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        if weight.dtype not in FLOAT_PRODUCTS or weight.shape[1] % (FEWEST_LANES * FloatProduct.lane_inputs):
            raise NotImplementedError(f"no compiled product for {weight.dtype} and {weight.shape[1]} inputs")
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        row_bytes = weight.stride(0) * weight.itemsize
        product = compiled(FLOAT_PRODUCTS[weight.dtype])
        super().__init__(
            product,
            weight,
            torch.empty(0),
            _bias(bias, len(weight)),
            row_bytes=row_bytes,
            scratch_bytes=functools.partial(moved_bytes, lanes=product.lanes),
        )


class CompiledInt8Linear(CompiledLinear):
    """`packed` (O, B) is of a `RowCodec`, and kept as it is. Raises NotImplementedError where there is no such product."""

    def __init__(self, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        if in_size % (FEWEST_LANES * Int8Product.lane_inputs):
            raise NotImplementedError(f"no compiled product for {in_size} inputs in eight bits")
        scales_O = RowCodec().codes(packed, in_size).scales_R
        product = first_compiled(INT8_PRODUCTS)
        super().__init__(
            product,
            packed,
            scales_O,
            _bias(bias, len(packed)),
            row_bytes=packed.stride(0),
            scratch_bytes=_widened_scratch_bytes if product.kind is WidenedInt8Product else _scratch_bytes,
        )


class CompiledInt4Linear(CompiledLinear):
    """`packed` (O, B) is of `codec`. Raises NotImplementedError where there is no such product."""

    def __init__(self, codec: GroupCodec, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        if codec.group_size % (UNROLLED * WORD_INPUTS) or in_size % codec.group_size:
            raise NotImplementedError(f"no compiled product for {in_size} inputs in groups of {codec.group_size}")
        product = first_compiled(INT4_PRODUCTS, codec.group_size)
        steps_minima_OG2 = codec.scales_minima(packed, in_size).float()
        steps_minima_OG2[..., 0].reciprocal_()
        lowest, largest = steps_minima_OG2.aminmax()
        if not -MAX_FLOAT16 <= lowest <= largest <= MAX_FLOAT16:
            raise NotImplementedError("no compiled product for steps that float16 cannot hold")
        halves_OG2 = steps_minima_OG2.half()
        num_outputs = panel_size(product.lanes)
        weight_PWC = lay_out(codec.code_pairs(packed, in_size), num_outputs)
        panels_PCG2 = _padded(halves_OG2, num_outputs).view(-1, num_outputs, *halves_OG2.shape[1:])
        scales_PG2C = panels_PCG2.permute(0, 2, 3, 1).contiguous()
        super().__init__(
            product,
            weight_PWC,
            scales_PG2C,
            _padded(_bias(bias, len(packed)), num_outputs),
            row_bytes=0,
            scratch_bytes=functools.partial(code_bytes, num_groups=in_size // codec.group_size),
        )
        self._out_size = len(packed)


def lay_out(codes_OB: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Bytes whose rows may lie apart to words (P, W, C), in panels of `num_outputs`, the last one filled with zeros."""
    (out_size, row_bytes), word = codes_OB.shape, torch.int32
    panels_PWC = torch.empty(-(-out_size // num_outputs), row_bytes // word.itemsize, num_outputs, dtype=word)
    counts = (out_size, row_bytes // word.itemsize, codes_OB.stride(0))
    compiled(LayOutPanels, num_outputs)((codes_OB, panels_PWC), counts)
    return panels_PWC


def _scratch_bytes(num_rows: int, num_inputs: int) -> int:
    return code_bytes(num_rows, num_inputs, num_groups=1)


def _widened_scratch_bytes(num_rows: int, num_inputs: int) -> int:
    codes = code_bytes(num_rows, num_inputs, num_groups=1, code_size=2)
    return codes + sums_bytes(num_rows, torch.get_num_threads())


def _bias(bias: torch.Tensor | None, out_size: int) -> torch.Tensor:
    return torch.zeros(out_size) if bias is None else bias.float()


def _padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """With zeros, in the first dimension."""
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, -len(x) % multiple])
