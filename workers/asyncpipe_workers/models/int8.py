"""Products with weights in eight bits, by torch's kernels.

Rows of inputs are quantized as they come, each by its own largest magnitude, and multiplied as integers (VNNI or tensor cores
where the processor has them). A row's result does not depend on what other rows are in the batch.

Shapes: R rows, I inputs, O outputs, B bytes of a packed row.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from asyncpipe_workers.memory.quantization import RowCodec

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
    `pack`, which another thread may call while this computes. x86-64 processors without VNNI go without it: its kernel adds up
    products of two there in 16 bits, and cuts off those that do not fit.
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
        if not self._is_on_cpu or self._codes_IO is None or not packed_sums_are_exact():
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


def packed_sums_are_exact() -> bool:
    """On this processor, whatever the numbers."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)  # that of AVX-512; the kernel knows no other
    return platform.machine() != "x86_64" or has_vnni()


def pack_all(linears: Sequence[Int8Linear], stop: threading.Event) -> None:
    """One after the other, while the stage is idle or at the least cost to it, until all are packed or `stop` is set."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PACKING_NICENESS)
    for linear in linears:
        if stop.is_set():
            return
        linear.pack()
