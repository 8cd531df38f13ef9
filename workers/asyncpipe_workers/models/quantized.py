"""Products with weights in eight and four bits.

int8: rows of inputs are quantized as they come, each by its own largest magnitude, and multiplied as integers (VNNI or tensor
cores where the processor has them). A row's result does not depend on what other rows are in the batch. int4: weights in groups
along the inputs, unpacked to bfloat16 in registers, which saves memory traffic and no arithmetic: for few rows.

Shapes: R rows, I inputs, O outputs, G groups, B bytes of a packed row.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from asyncpipe_workers.memory.quantization import Codec, GroupCodec, RowCodec
from asyncpipe_workers.models.kernels import PlainLinear, ResidentLinear

ROW_LIMIT = 127.0
ZERO_POINT = 128  # of inputs, which the kernels take as unsigned bytes
INT4_GROUPS = (32, 64, 128, 256)  # that the kernel knows
INT4_OUTPUTS = 16  # it works on so many rows of the weight at once
INT4_INNER_TILES = 8  # of 16 inputs, side by side in a GPU's layout
INT8_MULTIPLE = 8  # of which both sizes of a matrix are, for a GPU's kernel
INT8_MIN_ROWS = 32  # that it takes
TINY = 1e-30  # instead of the limit of a row of zeros
MIDDLE_CODE = 8  # its codes are 0 to 15, and mean code - 8


class Int8Linear:
    """`packed` (O, B) is of a `RowCodec`."""

    def __init__(self, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        codes_OI, scales_O = RowCodec().codes(packed, in_size)
        with _quietly():
            zero_points_O = torch.zeros(len(codes_OI), dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(codes_OI, scales_O, zero_points_O, 0)
            self._weight = torch.ops.quantized.linear_prepack(weight, None)
        self._bias = None if bias is None else bias.float()
        self._out_size = len(codes_OI)
        self.num_bytes = packed.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self._out_size)
        rows = x.reshape(-1, x.shape[-1]).float()
        limits_R1 = rows.abs().amax(1, keepdim=True).clamp_min_(TINY)
        y: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / limits_R1, 1 / ROW_LIMIT, ZERO_POINT, self._weight
        )
        y = y.mul_(limits_R1) if self._bias is None else torch.addcmul(self._bias, y, limits_R1, out=y)
        return y.view(*x.shape[:-1], self._out_size).to(x.dtype)


class Int8MatrixLinear:
    """As `Int8Linear`, of plain tensors: for GPUs. `packed` (O, B) is of a `RowCodec`."""

    def __init__(self, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        codes_OI, scales_O = RowCodec().codes(packed, in_size)
        self._codes_IO = codes_OI.contiguous().t()
        self._scales_O = scales_O.float()
        self._bias = None if bias is None else bias.float()
        self.num_bytes = packed.nbytes

    @staticmethod
    def fits(out_size: int, in_size: int) -> bool:
        return out_size % INT8_MULTIPLE == 0 and in_size % INT8_MULTIPLE == 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows_RI = x.reshape(-1, x.shape[-1]).float()
        steps_R1 = rows_RI.abs().amax(1, keepdim=True).clamp_min_(TINY) / ROW_LIMIT if len(rows_RI) else rows_RI[:, :1]
        codes_RI = F.pad((rows_RI / steps_R1).round_().to(torch.int8), (0, 0, 0, max(INT8_MIN_ROWS - len(rows_RI), 0)))
        y = torch._int_mm(codes_RI, self._codes_IO)[: len(rows_RI)].float().mul_(steps_R1).mul_(self._scales_O)
        y = y if self._bias is None else y.add_(self._bias)
        return y.view(*x.shape[:-1], -1).to(x.dtype) if len(rows_RI) else x.new_empty(*x.shape[:-1], len(self._scales_O))


class Int4Linear:
    """`packed` (O, B) is of `codec`."""

    def __init__(self, codec: GroupCodec, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        codes_OI, scales_OG, minima_OG = codec.codes(packed, in_size)
        steps_OG = scales_OG.reciprocal()
        zeros_OG = minima_OG + MIDDLE_CODE * steps_OG
        self._scales_zeros_GO2 = torch.stack([steps_OG, zeros_OG], dim=-1).transpose(0, 1).contiguous().bfloat16()
        if packed.device.type == "cpu":
            self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)
            self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            pairs = (codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]).to(torch.uint8)
            self._weight = torch.ops.aten._convert_weight_to_int4pack(pairs, INT4_INNER_TILES)
            self._multiply = torch.ops.aten._weight_int4pack_mm
        self._group_size = codec.group_size
        self._out_size = len(codes_OI)
        self._bias = bias
        self.num_bytes = packed.nbytes

    @staticmethod
    def fits(codec: GroupCodec, out_size: int, in_size: int, *, device: torch.device) -> bool:
        multiple = codec.group_size if device.type == "cpu" else math.lcm(codec.group_size, 16 * INT4_INNER_TILES)
        return codec.group_size in INT4_GROUPS and in_size % multiple == 0 and out_size % INT4_OUTPUTS == 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self._out_size)
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y: torch.Tensor = self._multiply(rows, self._weight, self._group_size, self._scales_zeros_GO2)
        y = y.view(*x.shape[:-1], self._out_size).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)


class QuantizedLinears:
    """Makes linears of packed rows, or of numbers, which it packs; they are on `device` then, and compute in `dtype` what no
    kernel is there for."""

    def __init__(self, codec: Codec, device: torch.device, dtype: torch.dtype) -> None:
        self.codec = codec
        self._device = device
        self._dtype = dtype

    def of_packed(self, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> ResidentLinear:
        """`packed` (O, B) is of `codec`."""
        packed, codec = packed.to(self._device), self.codec
        if isinstance(codec, GroupCodec) and Int4Linear.fits(codec, len(packed), in_size, device=self._device):
            return Int4Linear(codec, packed, in_size, bias)
        if self._device.type != "cpu" and not Int8MatrixLinear.fits(len(packed), in_size):
            return PlainLinear(codec.decode(packed, in_size, dtype=self._dtype), bias)
        if not isinstance(codec, RowCodec):
            packed = RowCodec().encode(codec.decode(packed, in_size, dtype=torch.float32))
        int8 = Int8Linear if self._device.type == "cpu" else Int8MatrixLinear
        return int8(packed, in_size, bias)

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ResidentLinear:
        return self.of_packed(self.codec.encode(weight), weight.shape[1], bias)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch announces the end of its quantized tensors; their kernels are the only ones of their kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
