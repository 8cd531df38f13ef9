"""y = x W^T + b with weights laid out for compiled products.

Shapes: R rows, I inputs, O outputs, C outputs of a panel, P panels, W words of a row, B bytes of a packed row, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from asyncpipe_workers.compiled.compiler import CompiledKernel, compiled
from asyncpipe_workers.compiled.panels import LayOutPanels
from asyncpipe_workers.compiled.products import (
    UNROLLED,
    BFloat16Product,
    Float16Product,
    FloatProduct,
    Int4Product,
    Int8Product,
    panel_size,
    scratch_bytes,
)
from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec
from asyncpipe_workers.tape import new_tensor

FLOAT_PRODUCTS = {torch.float32: FloatProduct, torch.float16: Float16Product, torch.bfloat16: BFloat16Product}


class CompiledLinear:
    """(..., I) to (..., O), whose rows may lie apart."""

    def __init__(
        self, product: CompiledKernel, words_OW: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, num_groups: int
    ) -> None:
        """`words_OW` are int16 or int32; `scales` are laid out already. `num_groups` of a row are quantized each by itself."""
        self._product = product
        self._out_size = len(words_OW)
        self._weight_PWC = lay_out(words_OW, panel_size(product.lanes))
        self._scales = scales
        self._bias = _padded(torch.zeros(self._out_size) if bias is None else bias.float(), panel_size(product.lanes))
        self._padded_size = len(self._bias)
        self._num_groups = num_groups
        self.num_bytes = words_OW.nbytes + scales.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 2 or x.dtype != torch.float32:  # a look costs less than calls that change nothing
            return self(x.reshape(-1, x.shape[-1]).float()).reshape(*x.shape[:-1], self._out_size).to(x.dtype)
        num_rows, in_size = x.shape
        y_RO = new_tensor(num_rows, self._padded_size)
        scratch = new_tensor(scratch_bytes(num_rows, in_size, self._num_groups), dtype=torch.uint8)
        tensors = (x.contiguous(), y_RO, self._weight_PWC, self._scales, self._bias, scratch)
        self._product(tensors, (num_rows, in_size, self._padded_size))
        return y_RO if self._padded_size == self._out_size else y_RO[:, : self._out_size]


class CompiledFloatLinear(CompiledLinear):
    """`weight` (O, I) is kept in the type that it has; sums are of float32. Raises NotImplementedError where there is no such
    product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        if weight.dtype not in FLOAT_PRODUCTS or weight.shape[1] % UNROLLED:
            raise NotImplementedError(f"no compiled product for {weight.dtype} and {weight.shape[1]} inputs")
        words_OW = weight.contiguous().view(torch.int16 if weight.itemsize == 2 else torch.int32)
        super().__init__(compiled(FLOAT_PRODUCTS[weight.dtype]), words_OW, torch.empty(0), bias, num_groups=0)


class CompiledInt8Linear(CompiledLinear):
    """`packed` (O, B) is of a `RowCodec`. Raises NotImplementedError where there is no such product."""

    def __init__(self, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        if in_size % (UNROLLED * Int8Product.word_inputs):
            raise NotImplementedError(f"no compiled product for {in_size} inputs in eight bits")
        product = compiled(Int8Product)
        codes_OI, scales_O = RowCodec().codes(packed, in_size)
        super().__init__(product, codes_OI.view(torch.int32), _padded(scales_O, panel_size(product.lanes)), bias, num_groups=1)


class CompiledInt4Linear(CompiledLinear):
    """`packed` (O, B) is of `codec`. Raises NotImplementedError where there is no such product."""

    def __init__(self, codec: GroupCodec, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        if codec.group_size % (UNROLLED * Int4Product.word_inputs) or in_size % codec.group_size:
            raise NotImplementedError(f"no compiled product for {in_size} inputs in groups of {codec.group_size}")
        product = compiled(Int4Product, codec.group_size)
        steps_minima_OG2 = codec.scales_minima(packed, in_size).float()
        steps_minima_OG2[..., 0].reciprocal_()
        halves_OG2 = steps_minima_OG2.half()
        if not halves_OG2.isfinite().all():
            raise NotImplementedError("no compiled product for steps that float16 cannot hold")
        words_OW = codec.code_pairs(packed, in_size).view(torch.int32)
        panels_PCG2 = _padded(halves_OG2, panel_size(product.lanes)).view(-1, panel_size(product.lanes), *halves_OG2.shape[1:])
        scales_PG2C = panels_PCG2.permute(0, 2, 3, 1).contiguous()
        super().__init__(product, words_OW, scales_PG2C, bias, num_groups=in_size // codec.group_size)


def lay_out(words_OW: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """(P, W, C), in panels of `num_outputs`, the last one filled with zeros. One thread is left for reading what comes next."""
    out_size, num_words = words_OW.shape
    panels_PWC = torch.empty(-(-out_size // num_outputs), num_words, num_outputs, dtype=words_OW.dtype)
    kernel = compiled(LayOutPanels, num_outputs, 8 * words_OW.itemsize)
    counts = (out_size, num_words, words_OW.stride(0))
    kernel((words_OW, panels_PWC), counts, num_threads=max(torch.get_num_threads() - 1, 1))
    return panels_PWC


def _padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """With zeros, in the first dimension."""
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, -len(x) % multiple])
