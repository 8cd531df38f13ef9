"""What products y = x W^T + b have in common: their arguments, and rows of inputs in eight bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from llvmlite import ir

from asyncpipe_workers.compiled.builder import BYTE, FLOAT32, WORD, Count
from asyncpipe_workers.compiled.kernel import Kernel

ADDRESSES = ("x", "y", "weight", "scales", "bias", "scratch")
COUNTS = ("rows", "inputs", "outputs", "row_bytes")
"""x (rows, inputs), y (rows, outputs) and bias are float32; row_bytes are from a row of the weight to the next."""

ASKED_BYTES = 4096  # ahead

SHARED_OUTPUTS = 64  # that a thread takes at once

KeepCodes: TypeAlias = Callable[[ir.Value, ir.Value, ir.Value], None]
"""Of a vector of codes, the number of their group among those of all rows, and which of the group's codes they begin with."""

MAX_CODE = 127.0
TINY = 1e-30  # instead of the largest magnitude of zeros


def code_bytes(num_rows: int, num_inputs: int, num_groups: int, code_size: int = 1) -> int:
    """Of scratch for rows in eight bits, each code in so many bytes, and two words for each group."""
    return num_rows * (num_inputs * code_size + 8 * num_groups)


class Product(Kernel):
    def __init__(self, lanes: int) -> None:
        super().__init__(lanes, ADDRESSES, COUNTS)

    def build(self) -> None:
        self.x, self.y, self.weight, self.scales, self.bias, self.scratch = (self.arguments[name] for name in ADDRESSES)
        self.rows, self.inputs, self.outputs, self.row_bytes = (self.arguments[name] for name in COUNTS)
        self.multiply()

    @abstractmethod
    def multiply(self) -> None: ...

    def weight_row(self, output: ir.Value) -> ir.Value:
        """Its address."""
        return self.b.at(self.weight, self.b.times(output, self.row_bytes))

    def result(self, row: ir.Value, output: ir.Value) -> ir.Value:
        """Its address."""
        return self.b.at(self.y, self.b.plus(self.b.times(row, self.outputs), output), FLOAT32)


class RowCodes:
    """Rows quantized as they come, each group of inputs by its own largest magnitude. In scratch are the codes (rows, inputs),
    then for each group of each row what its codes' unit is worth (float32), then the sum of its codes (int32); behind them is
    `rest`."""

    def __init__(self, kernel: Product, group_inputs: Count, code: ir.IntType = BYTE) -> None:
        """`code` is the type that codes are kept in."""
        self.b = kernel.b
        self._code = code
        self._kernel = kernel
        self.group_inputs = self.b.count(group_inputs)
        self.groups = self.b.over(kernel.inputs, self.group_inputs)  # of a row
        self._codes = kernel.scratch
        self._all_groups = self.b.times(kernel.rows, self.groups)
        self._units = self.b.at(self._codes, self.b.times(kernel.rows, kernel.inputs), code)
        self._sums = self.b.at(self._units, self._all_groups, FLOAT32)
        self.rest = self.b.at(self._sums, self._all_groups, WORD)

    def write(self, keep: KeepCodes, *, first_group: Count = 0) -> None:
        """Those of all groups from number `first_group` on, each thread its share, and none goes on before they are there.
        `keep` writes a vector of codes, by `self.keep` or elsewhere."""
        first = self.b.count(first_group)
        with self._kernel.own_share(self.b.sub(self._all_groups, first)) as n:
            self._quantize(self.b.plus(first, n), keep)
        self._kernel.wait_for_all()

    def keep(self, codes: ir.Value, group: ir.Value, first: ir.Value) -> None:
        """Codes of a group, from its number `first` on."""
        self.b.write(codes, self.b.at(self._codes, self.b.plus(self.b.times(group, self.group_inputs), first), self._code))

    def codes(self, row: ir.Value) -> ir.Value:
        """Their address."""
        return self.b.at(self._codes, self.b.times(row, self._kernel.inputs), self._code)

    def unit(self, row: ir.Value, group: Count = 0) -> ir.Value:
        """Its address; those of a row's groups follow."""
        return self.b.at(self._units, self._number(row, group), FLOAT32)

    def code_sum(self, row: ir.Value, group: Count = 0) -> ir.Value:
        """Its address, likewise."""
        return self.b.at(self._sums, self._number(row, group), WORD)

    def _number(self, row: ir.Value, group: Count) -> ir.Value:
        return self.b.plus(self.b.times(row, self.groups), group)

    def factor(self, group: ir.Value) -> ir.Value:
        """What makes codes of the numbers of a group; what their unit is worth is written."""
        b = self.b
        numbers = self._numbers(group)
        largest = b.variable(b.all_lanes(b.floats, 0.0))
        with b.loop(0, self.group_inputs, b.lanes) as n:
            magnitudes = b.magnitudes(b.read(b.at(numbers, n, FLOAT32), b.floats))
            largest.set(b.larger(largest.get(), magnitudes))
        limit = b.largest(largest.get())
        tiny = ir.Constant(FLOAT32, TINY)
        limit = b.select(b.fcmp_ordered("<", limit, tiny), tiny, limit)  # a NaN stays
        b.write(b.fdiv(limit, ir.Constant(FLOAT32, MAX_CODE)), b.at(self._units, group, FLOAT32))
        return b.fdiv(ir.Constant(FLOAT32, MAX_CODE), limit)

    def found(self, group: ir.Value, first: ir.Value, factor: ir.Value) -> ir.Value:
        """The codes of a vector of a group's numbers, from its number `first` on, as words."""
        numbers = self.b.read(self.b.at(self._numbers(group), first, FLOAT32), self.b.floats)
        return self.b.nearest(self.b.fmul(numbers, self.b.spread(factor)))

    def as_kept(self, words: ir.Value) -> ir.Value:
        return self.b.trunc(words, ir.VectorType(self._code, self.b.lanes))

    def _numbers(self, group: ir.Value) -> ir.Value:
        """Their address."""
        return self.b.at(self._kernel.x, self.b.times(group, self.group_inputs), FLOAT32)

    def _quantize(self, group: ir.Value, keep: KeepCodes) -> None:
        """Number `group` of all groups of all rows."""
        b = self.b
        factor, code_sum = self.factor(group), b.variable(b.all_lanes(b.words, 0))
        with b.loop(0, self.group_inputs, b.lanes) as n:
            found = self.found(group, n, factor)
            code_sum.set(b.add(code_sum.get(), found))
            keep(self.as_kept(found), group, n)
        b.write(b.sum(code_sum.get()), b.at(self._sums, group, WORD))
