"""Linears of weights that are quantized, in the form that is quickest on this machine.

Shapes: O outputs, B bytes of a packed row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial

import torch

from asyncpipe_workers.memory.quantization import Codec, GroupCodec, RowCodec
from asyncpipe_workers.models.int4 import Int4Linear
from asyncpipe_workers.models.int8 import Int8Linear
from asyncpipe_workers.models.kernels import PlainLinear, ResidentLinear, quickest_form, tried_outputs

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
        for form in self._best_first(codec, (len(packed), in_size)):
            with contextlib.suppress(NotImplementedError):
                linear = form(packed, in_size, bias)
                if isinstance(linear, Int8Linear):
                    self.to_pack.append(linear)
                return linear
        return None

    def _best_first(self, codec: Codec, shape: tuple[int, int]) -> list[PackedForm]:
        """Empty where no form is for such a shape."""
        forms, (out_size, in_size) = packed_forms(codec, self._device), shape
        if len(forms) == 1:
            return list(forms.values())

        def make(form: PackedForm) -> ResidentLinear:
            linear = form(codec.encode(torch.randn(1, in_size)).repeat(tried_outputs(out_size, in_size), 1), in_size, None)
            if isinstance(linear, Int8Linear):
                linear.pack()
            return linear

        makers = {name: partial(make, form) for name, form in forms.items()}
        try:
            best = quickest_form(f"{codec.compression.num_bits} bits", makers, shape, self._dtype)
        except NotImplementedError:
            return []
        return [forms[name] for name in sorted(forms, key=lambda name: name != best)]
