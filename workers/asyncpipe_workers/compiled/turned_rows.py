"""Products in eight bits for many rows of inputs: vectors are of rows, and a weight's words go to all of their lanes.

Rows are turned as they are quantized: those of a few vectors are a group, in which each word of inputs of all of its rows come
after each other. What is left of rows is a group of half as many vectors, and so on. So no sum goes from lane to lane, and the
result is the same to the last bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from llvmlite import ir

from asyncpipe_workers.compiled.builder import FLOAT32, WORD
from asyncpipe_workers.compiled.product import Product, RowCodes

OUTPUTS = 4  # whose sums are in registers for a group of most vectors, more of them for a smaller one
UNROLLED = 4  # words


class Groups(NamedTuple):
    """Of rows from `first` on, up to `end`."""

    first: ir.Value
    end: ir.Value
    num_vectors: int
    num_outputs: int


class TurnedRows(ABC):
    word_inputs: ClassVar[int]  # as many as a vector's lane has of one row
    fewest_rows: ClassVar[int] = 1  # of which any are turned
    num_sizes: ClassVar[int | None] = None  # of groups, the largest first; None: down to a vector

    def __init__(self, kernel: Product, rows: RowCodes) -> None:
        """As many as fill groups are taken from the first on; inputs are a multiple of UNROLLED words'."""
        self.b = kernel.b
        self._kernel = kernel
        self._rows = rows
        most_vectors = kernel.lanes // 4
        are_enough = self.b.icmp_signed(">=", kernel.rows, self.b.count(self.fewest_rows))
        turned_rows = self.b.select(are_enough, kernel.rows, self.b.count(0))
        self.num_rows: ir.Value = self.b.count(0)
        self._groups: list[Groups] = []
        for num_vectors in [most_vectors >> n for n in range(most_vectors.bit_length())][: self.num_sizes]:
            end = self.b.whole(turned_rows, num_vectors * kernel.lanes)
            self._groups.append(Groups(self.num_rows, end, num_vectors, OUTPUTS * most_vectors // num_vectors))
            self.num_rows = end

    def write_factors(self) -> None:
        """Of the rows in groups; each is where a row's sum of codes would be, which these rows do without."""
        with self._kernel.own_share(self.num_rows) as row:
            self.b.write(self._rows.factor(row), self._rows.code_sum(row))

    def write_codes(self) -> None:
        """After the factors; no thread goes on before all are there."""
        b = self.b
        vectors = b.over(self._kernel.inputs, b.lanes)  # of a row
        with b.if_then(self._are_there()):
            with self._kernel.own_share(b.times(b.over(self.num_rows, b.lanes), vectors)) as n:
                self._write_block(b.times(b.over(n, vectors), b.lanes), b.times(b.urem(n, vectors), b.lanes))
            self._kernel.wait_for_all()

    def multiply(self, first: ir.Value, last: ir.Value) -> None:
        """With outputs from `first` to `last`, SHARED_OUTPUTS at most."""
        with self.b.if_then(self._are_there()):
            self._multiply_all(first, last)

    @abstractmethod
    def _multiply_all(self, first: ir.Value, last: ir.Value) -> None: ...

    @abstractmethod
    def _as_words(self, codes: ir.Value) -> ir.Value:
        """A vector of codes of a row, `word_inputs` in a word."""

    def _write_block(self, row: ir.Value, first: ir.Value) -> None:
        """Of a vector of rows, a vector of inputs of each: threads write whole lines of a cache."""
        b = self.b
        num_words = b.lanes // self.word_inputs
        blocks = [self._as_words(self._codes(b.plus(row, n), first)) for n in range(b.lanes)]
        while len(blocks) > 1:
            blocks = [b.picked(*pair, range(2 * pair[0].type.count)) for pair in zip(blocks[::2], blocks[1::2], strict=True)]
        group_first, group_rows = self._group_of(row)
        own = b.at(self._rows.codes(group_first), b.sub(row, group_first), WORD)
        for n in range(num_words):
            words = b.ordered(blocks[0], range(n, b.lanes * num_words, num_words))
            place = b.times(b.plus(b.over(first, self.word_inputs), n), group_rows)
            b.write(words, b.at(own, place, WORD))

    def _codes(self, row: ir.Value, first: ir.Value) -> ir.Value:
        """A vector of inputs of a row."""
        return self._rows.as_kept(self._rows.found(row, first, self.b.read(self._rows.code_sum(row), FLOAT32)))

    def _are_there(self) -> ir.Value:
        return self.b.icmp_signed(">", self.num_rows, self.b.count(0))

    def _group_of(self, row: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Its group's first row, and how many the group has."""
        b = self.b
        *larger, smallest = self._groups
        first, num = b.whole(row, self._size(smallest)), b.count(self._size(smallest))
        for groups in reversed(larger):
            is_here, size = b.icmp_signed("<", row, groups.end), b.count(self._size(groups))
            first, num = b.select(is_here, b.whole(row, size), first), b.select(is_here, size, num)
        return first, num

    def _size(self, groups: Groups) -> int:
        return groups.num_vectors * self.b.lanes

    def _units(self, row: ir.Value) -> ir.Value:
        """What the codes of a vector of rows are worth."""
        return self.b.read(self._rows.unit(row), self.b.floats)

    def _scaled(self, sums: ir.Value, units: ir.Value, output: ir.Value) -> ir.Value:
        b = self.b
        scale, bias = (
            b.spread(b.read(b.at(own, output, FLOAT32), FLOAT32)) for own in (self._kernel.scales, self._kernel.bias)
        )
        return b.fused(b.sitofp(sums, b.floats), b.fmul(scale, units), bias)

    def _write(self, results: Sequence[ir.Value], to: ir.Value, row_len: ir.Value) -> None:
        """A vector of rows for each output."""
        b, num = self.b, len(results)
        while len(results) > 1:  # until each row's numbers lie beside each other
            half = len(results) // 2
            results = [self._by_turns(a, c) for a, c in zip(results[:half], results[half:], strict=True)]
        for n in range(b.lanes):
            own = b.ordered(results[0], range(n * num, (n + 1) * num))
            b.write(own, b.at(to, b.times(row_len, n), FLOAT32))

    def _by_turns(self, a: ir.Value, c: ir.Value) -> ir.Value:
        """Lanes of both, twice as many."""
        count = a.type.count
        order = [lane // 2 + lane % 2 * count for lane in range(2 * count)]
        return self.b.picked(a, c, order)
