"""The instructions of what happens to rows between products: norms, rotary positions, gates. torch takes several calls for
each, and after a large product, which leaves nothing else in the caches, a call costs more than its arithmetic.

Everything is float32. Rows are shared out among the threads; within one, as many numbers as a vector has lanes are computed at
a time: sizes are multiples of that.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping

from llvmlite import ir

from asyncpipe_workers.compiled.builder import FLOAT32, Builder
from asyncpipe_workers.compiled.kernel import Kernel


class RowKernel(Kernel):
    def build(self) -> None:
        with self.own_share(self.arguments["rows"]) as row:
            self.build_row(row)

    @abstractmethod
    def build_row(self, row: ir.Value) -> None: ...

    def one_over_root(self, square: ir.Value, eps: float) -> ir.Value:
        """In every lane."""
        b = self.b
        root = b.outside("llvm.sqrt.f32", FLOAT32, b.fadd(square, ir.Constant(FLOAT32, eps)))
        return b.spread(b.fdiv(ir.Constant(FLOAT32, 1.0), root))


class RMSNormRows(RowKernel):
    """x, N heads of K numbers whose rows are `stride` numbers apart, to y (rows, N, K): each head over its root mean square,
    times its weight (N, K)."""

    def __init__(self, lanes: int, eps: float) -> None:
        self._eps = eps
        super().__init__(lanes, ("x", "y", "weight"), ("rows", "heads", "size", "stride"))

    def build_row(self, row: ir.Value) -> None:
        b = self.b
        x, y, weight, _, heads, size, stride = self.arguments.values()
        with b.loop(0, heads) as head:
            first = b.times(head, size)
            own = b.at(x, b.plus(b.times(row, stride), first), FLOAT32)
            target = b.at(y, b.plus(b.times(row, heads, size), first), FLOAT32)
            weights = b.at(weight, first, FLOAT32)
            squares = b.variable(b.all_lanes(b.floats, 0.0))
            with b.loop(0, size, self.lanes) as n:
                numbers = b.read(b.at(own, n, FLOAT32), b.floats)
                squares.set(b.fused(numbers, numbers, squares.get()))
            factor = self.one_over_root(b.fdiv(b.sum(squares.get()), b.sitofp(size, FLOAT32)), self._eps)
            with b.loop(0, size, self.lanes) as n:
                normed = b.fmul(b.read(b.at(own, n, FLOAT32), b.floats), factor)
                b.write(b.fmul(normed, b.read(b.at(weights, n, FLOAT32), b.floats)), b.at(target, n, FLOAT32))


class LayerNormRows(RowKernel):
    """x, whose rows are `stride` numbers apart, to y (rows, size): less its mean, over its standard deviation, times weight and
    plus bias, both (size,)."""

    def __init__(self, lanes: int, eps: float) -> None:
        self._eps = eps
        super().__init__(lanes, ("x", "y", "weight", "bias"), ("rows", "size", "stride"))

    def build_row(self, row: ir.Value) -> None:
        b = self.b
        x, y, weight, bias, _, size, stride = self.arguments.values()
        own, target = b.at(x, b.times(row, stride), FLOAT32), b.at(y, b.times(row, size), FLOAT32)
        total = b.variable(b.all_lanes(b.floats, 0.0))
        with b.loop(0, size, self.lanes) as n:
            total.set(b.fadd(total.get(), b.read(b.at(own, n, FLOAT32), b.floats)))
        mean = b.spread(b.fdiv(b.sum(total.get()), b.sitofp(size, FLOAT32)))
        squares = b.variable(b.all_lanes(b.floats, 0.0))
        with b.loop(0, size, self.lanes) as n:
            apart = b.fsub(b.read(b.at(own, n, FLOAT32), b.floats), mean)
            squares.set(b.fused(apart, apart, squares.get()))
        factor = self.one_over_root(b.fdiv(b.sum(squares.get()), b.sitofp(size, FLOAT32)), self._eps)
        with b.loop(0, size, self.lanes) as n:
            normed = b.fmul(b.fsub(b.read(b.at(own, n, FLOAT32), b.floats), mean), factor)
            scaled = b.fused(normed, b.read(b.at(weight, n, FLOAT32), b.floats), b.read(b.at(bias, n, FLOAT32), b.floats))
            b.write(scaled, b.at(target, n, FLOAT32))


class AddRows(RowKernel):
    """x to y, of `size` numbers each, whose rows are so many numbers apart."""

    def __init__(self, lanes: int) -> None:
        super().__init__(lanes, ("y", "x"), ("rows", "size", "y_stride", "x_stride"))

    def build_row(self, row: ir.Value) -> None:
        b = self.b
        y, x, _, size, y_stride, x_stride = self.arguments.values()
        with b.loop(0, size, self.lanes) as n:
            place = b.at(y, b.plus(b.times(row, y_stride), n), FLOAT32)
            more = b.read(b.at(x, b.plus(b.times(row, x_stride), n), FLOAT32), b.floats)
            b.write(b.fadd(b.read(place, b.floats), more), place)


class WeightedRows(RowKernel):
    """x (rows, size), each row times its weight, to y (rows, size), or `is_added` to what is there."""

    def __init__(self, lanes: int, is_added: bool) -> None:
        self._is_added = is_added
        super().__init__(lanes, ("x", "y", "weight"), ("rows", "size"))

    def build_row(self, row: ir.Value) -> None:
        b = self.b
        x, y, weight, _, size = self.arguments.values()
        factor = b.spread(b.read(b.at(weight, row, FLOAT32), FLOAT32))
        with b.loop(0, size, self.lanes) as n:
            number = b.plus(b.times(row, size), n)
            own, place = b.fmul(b.read(b.at(x, number, FLOAT32), b.floats), factor), b.at(y, number, FLOAT32)
            b.write(b.fadd(b.read(place, b.floats), own) if self._is_added else own, place)


class ChangedRows(RowKernel):
    """x, of `size` numbers, whose rows are `stride` numbers apart, in its place."""

    def __init__(self, lanes: int) -> None:
        super().__init__(lanes, ("x",), ("rows", "size", "stride"))

    def build_row(self, row: ir.Value) -> None:
        b = self.b
        x, _, size, stride = self.arguments.values()
        with b.loop(0, size, self.lanes) as n:
            place = b.at(x, b.plus(b.times(row, stride), n), FLOAT32)
            b.write(self.changed(b.read(place, b.floats)), place)

    @abstractmethod
    def changed(self, x: ir.Value) -> ir.Value: ...


class ScaleRows(ChangedRows):
    """Times a factor."""

    def __init__(self, lanes: int, factor: float) -> None:
        self._factor = factor
        super().__init__(lanes)

    def changed(self, x: ir.Value) -> ir.Value:
        return self.b.fmul(x, self.b.all_lanes(self.b.floats, self._factor))


class TurnRows(RowKernel):
    """Rotary positions, in place: of x, N heads of K numbers whose rows are `stride` numbers apart, number i is turned together
    with number i + F, for the first F. Rows of `cos` are `cos_stride` numbers apart, of which the first F count; `sin` is
    (rows, F)."""

    def __init__(self, lanes: int) -> None:
        super().__init__(lanes, ("x", "cos", "sin"), ("rows", "heads", "size", "turned", "stride", "cos_stride"))

    def build_row(self, row: ir.Value) -> None:
        b = self.b
        x, cos, sin, _, heads, size, turned, stride, cos_stride = self.arguments.values()
        with b.loop(0, heads) as head, b.loop(0, turned, self.lanes) as n:
            low_at = b.at(x, b.plus(b.times(row, stride), b.times(head, size), n), FLOAT32)
            high_at = b.at(low_at, turned, FLOAT32)
            low, high = b.read(low_at, b.floats), b.read(high_at, b.floats)
            cosines = b.read(b.at(cos, b.plus(b.times(row, cos_stride), n), FLOAT32), b.floats)
            sines = b.read(b.at(sin, b.plus(b.times(row, turned), n), FLOAT32), b.floats)
            b.write(b.fsub(b.fmul(low, cosines), b.fmul(high, sines)), low_at)
            b.write(b.fused(low, sines, b.fmul(high, cosines)), high_at)


class GateRows(RowKernel):
    """gate_up (rows, 2 F), whose rows are `stride` numbers apart, to y (rows, F): the activation of the first half times the
    second. Raises NotImplementedError for an activation that is not there."""

    def __init__(self, lanes: int, activation: str) -> None:
        self._activation = _instructions(activation)
        super().__init__(lanes, ("gate_up", "y"), ("rows", "size", "stride"))

    def build_row(self, row: ir.Value) -> None:
        b = self.b
        gate_up, y, _, size, stride = self.arguments.values()
        gate = b.at(gate_up, b.times(row, stride), FLOAT32)
        with b.loop(0, size, self.lanes) as n:
            activated = self._activation(b, b.read(b.at(gate, n, FLOAT32), b.floats))
            up = b.read(b.at(gate, b.plus(size, n), FLOAT32), b.floats)
            b.write(b.fmul(activated, up), b.at(y, b.plus(b.times(row, size), n), FLOAT32))


class ActivationRows(ChangedRows):
    """The activation. Raises NotImplementedError for one that is not there."""

    def __init__(self, lanes: int, activation: str) -> None:
        self._activation = _instructions(activation)
        super().__init__(lanes)

    def changed(self, x: ir.Value) -> ir.Value:
        return self._activation(self.b, x)


def _instructions(activation: str) -> Callable[[Builder, ir.Value], ir.Value]:
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"no kernel for {activation}")
    return ACTIVATIONS[activation]


def _relu(b: Builder, x: ir.Value) -> ir.Value:
    return b.larger(x, b.all_lanes(b.floats, 0.0))


def _silu(b: Builder, x: ir.Value) -> ir.Value:
    """x / (1 + e^-x)."""
    return b.fdiv(x, b.fadd(b.exp(b.fneg(x)), b.all_lanes(b.floats, 1.0)))


def _gelu(b: Builder, x: ir.Value) -> ir.Value:
    """x / 2 (1 + erf(x / sqrt(2)))."""
    one, half = (b.all_lanes(b.floats, n) for n in (1.0, 0.5))
    erf = b.erf(b.fmul(x, b.all_lanes(b.floats, math.sqrt(0.5))))
    return b.fmul(b.fmul(x, half), b.fadd(erf, one))


def _gelu_tanh(b: Builder, x: ir.Value) -> ir.Value:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    one = b.all_lanes(b.floats, 1.0)
    factor = b.fused(b.fmul(x, x), b.all_lanes(b.floats, 0.044715), one)
    inner = b.fmul(b.fmul(x, factor), b.all_lanes(b.floats, math.sqrt(2 / math.pi)))
    return b.fmul(b.fmul(x, b.all_lanes(b.floats, 0.5)), b.fadd(b.tanh(inner), one))


ACTIVATIONS: Mapping[str, Callable[[Builder, ir.Value], ir.Value]] = {
    "relu": _relu,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
