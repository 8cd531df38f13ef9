"""Products with weights in eight bits, and the choice of a form for weights that are quantized.

Rows of inputs are quantized as they come, each by its own largest magnitude, and multiplied as integers (VNNI or tensor cores
where the processor has them). A row's result does not depend on what other rows are in the batch.

Shapes: R rows, I inputs, O outputs, B bytes of a packed row.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from asyncpipe_workers.memory.quantization import Codec, GroupCodec, RowCodec
from asyncpipe_workers.models.int4 import Int4Linear
from asyncpipe_workers.models.kernels import PlainLinear, ResidentLinear, quickest_form

ROW_LIMIT = 127.0
ZERO_POINT = 128  # of inputs, which the kernels take as unsigned bytes
INT8_MULTIPLE = 8  # of which both sizes of a matrix are, for a GPU's kernel
INT8_MIN_ROWS = 32  # that it takes
TINY = 1e-30  # instead of the limit of a row of zeros
PACKING_NICENESS = 10  # a tenth of a core's time where computing wants it too (setpriority(2))

# torch announces the end of its quantized tensors; their kernels are the only ones of their kind.
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, .* are deprecated")


class Int8Linear:
    """`packed` (O, B) is of a `RowCodec`, on the device to compute on. Raises NotImplementedError for shapes that it has no
    kernel for.

    On a CPU there is a quicker form, the same to the last bit, which takes longer to make than to read the weight from disk:
    `pack`, which another thread may call while this computes.
    """

    def __init__(self, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> None:
        codes_OI, self._scales_O = RowCodec().codes(packed, in_size)
        self._is_on_cpu = packed.device.type == "cpu"
        if not self._is_on_cpu and (len(packed) % INT8_MULTIPLE or in_size % INT8_MULTIPLE):
            raise NotImplementedError(f"a GPU's kernel takes multiples of {INT8_MULTIPLE}, not ({len(packed)}, {in_size})")
        self._codes_IO: torch.Tensor | None = (codes_OI if self._is_on_cpu else codes_OI.contiguous()).t()
        self._packed: Any = None  # instead of the codes; oneDNN's or FBGEMM's
        self._out_steps_O = self._scales_O * torch.tensor(1 / ROW_LIMIT)
        self._bias = None if bias is None else bias.float()
        self.num_bytes = packed.nbytes

    def pack(self) -> None:
        """Where there is no such form, it stays as it is."""
        if not self._is_on_cpu or self._codes_IO is None:
            return
        zero_points_O = torch.zeros(len(self._scales_O), dtype=torch.long)
        with contextlib.suppress(RuntimeError):
            weight = torch._make_per_channel_quantized_tensor(self._codes_IO.t().contiguous(), self._scales_O, zero_points_O, 0)
            self._packed = torch.ops.quantized.linear_prepack(weight, None)
            self._codes_IO = None  # after the other is there: `_multiply` takes what it finds

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], len(self._scales_O))
        rows_RI = x.reshape(-1, x.shape[-1]).float()
        limits_R1 = rows_RI.abs().amax(1, keepdim=True).clamp_min_(TINY)
        y = self._multiply(rows_RI / limits_R1)
        y = y.mul_(limits_R1) if self._bias is None else torch.addcmul(self._bias, y, limits_R1, out=y)
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    def _multiply(self, unit_RI: torch.Tensor) -> torch.Tensor:
        """(R, O), of rows whose numbers are within 1."""
        codes_IO = self._codes_IO
        if codes_IO is None:
            y: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                unit_RI, 1 / ROW_LIMIT, ZERO_POINT, self._packed
            )
            return y
        codes_RI = (unit_RI * ROW_LIMIT).round_().to(torch.int8)
        if not self._is_on_cpu and len(codes_RI) < INT8_MIN_ROWS:
            codes_RI = F.pad(codes_RI, (0, 0, 0, INT8_MIN_ROWS - len(codes_RI)))
        return torch._int_mm(codes_RI, codes_IO)[: len(unit_RI)].float().mul_(self._out_steps_O)


def pack_all(linears: Sequence[Int8Linear], stop: threading.Event) -> None:
    """One after the other, while the stage is idle or at the least cost to it, until all are packed or `stop` is set."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PACKING_NICENESS)
    for linear in linears:
        if stop.is_set():
            return
        linear.pack()


PackedForm = Callable[[torch.Tensor, int, torch.Tensor | None], ResidentLinear]
"""Of packed rows (O, B), their number of inputs, and a bias (O,). Raises NotImplementedError for what it is not for."""


def packed_forms(codec: Codec, device: torch.device) -> Mapping[str, PackedForm]:
    """For rows of `codec`; where they are about as quick, the first."""
    forms: dict[str, PackedForm] = {}
    if device.type == "cpu":
        with contextlib.suppress(ImportError):
            from asyncpipe_workers.compiled.linears import CompiledInt4Linear, CompiledInt8Linear

            forms["compiled"] = partial(CompiledInt4Linear, codec) if isinstance(codec, GroupCodec) else CompiledInt8Linear
    forms["torch"] = partial(Int4Linear, codec) if isinstance(codec, GroupCodec) else Int8Linear
    return forms


class QuantizedLinears:
    """Makes linears of packed rows, or of numbers, which it packs; they are on `device` then, and compute in `dtype` what no
    kernel is there for."""

    def __init__(self, codec: Codec, device: torch.device, dtype: torch.dtype) -> None:
        self.codec = codec
        self._device = device
        self._dtype = dtype
        self.to_pack: list[Int8Linear] = []  # all that were made

    def of_packed(self, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None) -> ResidentLinear:
        """`packed` (O, B) is of `codec`."""
        packed = packed.to(self._device)
        linear = self._in_best_form(self.codec, packed, in_size, bias)
        if linear is None and not isinstance(self.codec, RowCodec):
            rows = RowCodec().encode(self.codec.decode(packed, in_size, dtype=torch.float32))
            linear = self._in_best_form(RowCodec(), rows, in_size, bias)
        return linear or PlainLinear(self.codec.decode(packed, in_size, dtype=self._dtype), bias)

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ResidentLinear:
        return self.of_packed(self.codec.encode(weight), weight.shape[1], bias)

    def _in_best_form(
        self, codec: Codec, packed: torch.Tensor, in_size: int, bias: torch.Tensor | None
    ) -> ResidentLinear | None:
        """None where no form is for such a shape. One may be for the shape and yet not for these numbers."""
        forms = packed_forms(codec, self._device)
        with contextlib.suppress(NotImplementedError):
            best = self._quickest(codec, forms, (len(packed), in_size)) if len(forms) > 1 else ""
            for name in sorted(forms, key=lambda name: name != best):
                with contextlib.suppress(NotImplementedError):
                    linear = forms[name](packed, in_size, bias)
                    if isinstance(linear, Int8Linear):
                        self.to_pack.append(linear)
                    return linear
        return None

    def _quickest(self, codec: Codec, forms: Mapping[str, PackedForm], shape: tuple[int, int]) -> str:
        out_size, in_size = shape

        def make(form: PackedForm) -> ResidentLinear:
            linear = form(codec.encode(torch.randn(1, in_size)).repeat(out_size, 1), in_size, None)
            if isinstance(linear, Int8Linear):
                linear.pack()
            return linear

        what = f"{codec.compression.num_bits} bits {out_size}x{in_size}"
        return quickest_form(what, {name: partial(make, form) for name, form in forms.items()}, in_size, self._dtype)
