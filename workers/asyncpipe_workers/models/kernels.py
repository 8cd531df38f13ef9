"""Matrix products in the form that this machine computes fastest.

A weight that stays is given its form once, when it is loaded: as it is, packed by oneDNN for its own kernels, or laid out for
products that are compiled here, whichever is quickest for its shape. The last keep a weight in float16 or bfloat16, as most
checkpoints are stored, where float32 is computed in: the same numbers from half of the memory. Shapes: R rows, I inputs,
O outputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F

from asyncpipe_workers.quickest import Call, quickest

TRIED_ROWS = (1, 8, 32, 128)
TRIED_NUMBERS = 1 << 22  # of a weight
TRIED_OUTPUTS_PER_THREAD = 256
OTHER_WEIGHTS = 64  # of a model, as large as the one at hand, and a byte for each of their numbers
MAX_ROWS = 512  # beyond, both forms are bound by arithmetic
OFF_TAPE_GAIN = 0.8  # what a form must take less than, that takes its whole stage off the tape
PACKED_FOR_ROWS = 32  # oneDNN chooses the layout of a packed weight for a batch; this one does well with others too


class ResidentLinear(Protocol):
    """y = x W^T + b, (..., I) to (..., O)."""

    num_bytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


LinearMaker = Callable[[torch.Tensor, torch.Tensor | None], ResidentLinear]
"""Of a weight (O, I) and a bias (O,). The weight is not changed; it is kept only if the form needs it as it is."""


class PlainLinear:
    """The weight as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self.num_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = project(x, self._weight)
        return y if self._bias is None else y.add_(self._bias)


class PackedLinear:
    """oneDNN's kernel on a weight in oneDNN's layout: float32 or bfloat16, on a CPU."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        self._bias = bias
        self.num_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return onednn_linear(x, self._weight, self._bias)


class FloatLinears:
    """Makes linears that compute in `dtype`, in the form that is quickest for their shape."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ResidentLinear:
        """`weight` is of a type that `fits` `dtype`."""
        if weight.device.type != "cpu":
            return PlainLinear(weight.to(self.dtype), bias)
        make = self._quickest(weight.dtype, (weight.shape[0], weight.shape[1]))
        return make(weight, bias)

    def forms(self, stored: torch.dtype) -> Mapping[str, LinearMaker]:
        """For weights of that type; where they are about as quick, the first. What is compiled can be played from a tape."""
        forms: dict[str, LinearMaker] = {}
        with contextlib.suppress(ImportError):
            from asyncpipe_workers.compiled.linears import CompiledFloatLinear

            forms["compiled"] = CompiledFloatLinear
        return forms | {"plain": self._converted(PlainLinear), "packed": self._converted(PackedLinear)}

    def _quickest(self, stored: torch.dtype, shape: tuple[int, int]) -> LinearMaker:
        @functools.cache
        def weight() -> torch.Tensor:
            return torch.randn(tried_outputs(*shape), shape[1]).mul_(0.02).to(stored)

        forms = self.forms(stored)
        makers = {name: lambda form=form: form(weight(), None) for name, form in forms.items()}
        kind = f"{self.dtype}" if stored == self.dtype else f"{stored} as {self.dtype}"
        return forms[quickest_form(kind, makers, shape, self.dtype)]

    def _converted(self, form: LinearMaker) -> LinearMaker:
        return lambda weight, bias: form(weight.to(self.dtype), bias)


def fits(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether `dtype` has all numbers of `stored`."""
    return torch.promote_types(stored, dtype) == dtype


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T: (..., I) and (O, I) to (..., O)."""
    if x.ndim == 2 and 1 < len(x) <= MAX_ROWS and x.device.type == "cpu" and weight_first_is_faster(x.dtype):
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b by oneDNN's kernel, on a CPU: (..., I) and (O, I), packed or of any strides, to (..., O)."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@functools.cache
def weight_first_is_faster(dtype: torch.dtype) -> bool:
    """Whether (W x^T)^T beats x W^T for few rows: with some processors and libraries by half, with others not."""

    @functools.cache
    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(32, 1024, dtype=dtype), torch.zeros(4096, 1024, dtype=dtype)

    ways: dict[str, Callable[[], list[Call]]] = {
        "rows first": lambda: [lambda: F.linear(*operands())],
        "weight first": lambda: [lambda: torch.mm(operands()[1], operands()[0].t())],
    }
    return quickest(f"{dtype}", ways) == "weight first"


def tried_outputs(out_size: int, in_size: int) -> int:
    """How many of a weight are enough to tell which form is quickest: as many as take a moment, and give all threads work."""
    return min(out_size, max(TRIED_NUMBERS // in_size, TRIED_OUTPUTS_PER_THREAD * torch.get_num_threads()))


def quickest_form(
    what: str, makers: Mapping[str, Callable[[], ResidentLinear]], shape: tuple[int, int], dtype: torch.dtype
) -> str:
    """The name of the form that is best over few and many rows, of those that make the same linear, for weights of `shape`: the
    first, unless another is quicker by far."""
    out_size, in_size = shape

    def calls(make: Callable[[], ResidentLinear]) -> list[Call]:
        linear = make()
        return [functools.partial(linear, torch.randn(rows, in_size).to(dtype)) for rows in TRIED_ROWS]

    ways = {name: functools.partial(calls, make) for name, make in makers.items()}
    between_bytes = OTHER_WEIGHTS * out_size * in_size
    return quickest(f"{what} {out_size}x{in_size}", ways, between_bytes=between_bytes, min_gain=OFF_TAPE_GAIN)
