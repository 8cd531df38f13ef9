"""Products in eight bits for many rows of inputs: vectors are of rows, and a weight's words go to all of their lanes.

Rows are turned as they are quantized: those of a few vectors are a group, in which each four inputs of all of its rows come
after each other. What is left of rows is a group of half as many vectors, and so on. So no sum goes from lane to lane, which
takes a fifth to a third of the time of products along rows, and the result is the same to the last bit. The instruction takes
codes of rows as unsigned, 128 more than they are; what that adds to an output's sums is taken away beforehand. Meanwhile the
weight's rows are asked for that the thread will probably come to next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from asyncpipe_workers.compiled.builder import BYTE, FLOAT32, LINE_BYTES, WORD
from asyncpipe_workers.compiled.product import ASKED_BYTES, SHARED_OUTPUTS, Product, RowCodes

OUTPUTS = 4  # whose sums are in registers for a group of most vectors, more of them for a smaller one; and are written together
WORD_INPUTS = 4
UNROLLED = 4  # words
OFFSET = 128


class _Groups(NamedTuple):
    """Of rows from `first` on, up to `end`."""

    first: ir.Value
    end: ir.Value
    num_vectors: int
    num_outputs: int


class ManyRows:
    def __init__(self, kernel: Product, rows: RowCodes) -> None:
        """As many as fill groups are taken from the first on; inputs are a multiple of UNROLLED words'."""
        self.b = kernel.b
        self._kernel = kernel
        self._rows = rows
        most_vectors = kernel.lanes // 4
        self.num_rows: ir.Value = self.b.count(0)
        self._groups: list[_Groups] = []
        for num_vectors in (most_vectors >> n for n in range(most_vectors.bit_length())):
            end = self.b.whole(kernel.rows, num_vectors * kernel.lanes)
            self._groups.append(_Groups(self.num_rows, end, num_vectors, OUTPUTS * most_vectors // num_vectors))
            self.num_rows = end
        self._asked_outputs = self.b.times(SHARED_OUTPUTS, kernel.num_threads())
        self._corrections = self.b.room(SHARED_OUTPUTS, WORD)
        self._results = self.b.room(most_vectors * kernel.lanes * kernel.lanes, FLOAT32)

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
        b = self.b
        with b.if_then(self._are_there()):
            with b.loop(first, last) as output:
                b.write(self._correction(output), b.at(self._corrections, b.sub(output, first), WORD))
            for groups in self._groups:
                self._multiply_groups(groups, first, last)

    def _write_block(self, row: ir.Value, first: ir.Value) -> None:
        """Of a vector of rows, a vector of inputs of each: threads write whole lines of a cache."""
        b = self.b
        num_words = b.lanes // WORD_INPUTS
        blocks = [self._codes(b.plus(row, n), first, num_words) for n in range(b.lanes)]
        while len(blocks) > 1:
            blocks = [b.picked(*pair, range(2 * pair[0].type.count)) for pair in zip(blocks[::2], blocks[1::2], strict=True)]
        group_first, group_rows = self._group_of(row)
        own = b.at(self._rows.codes(group_first), b.sub(row, group_first), WORD)
        for n in range(num_words):
            words = b.ordered(blocks[0], range(n, b.lanes * num_words, num_words))
            place = b.times(b.plus(b.over(first, WORD_INPUTS), n), group_rows)
            b.write(words, b.at(own, place, WORD))

    def _codes(self, row: ir.Value, first: ir.Value, num_words: int) -> ir.Value:
        """A vector of inputs of a row, unsigned, four in a word."""
        b = self.b
        codes = self._rows.as_bytes(self._rows.found(row, first, b.read(self._rows.code_sum(row), FLOAT32)))
        return b.bitcast(b.xor(codes, b.all_lanes(codes.type, OFFSET)), ir.VectorType(WORD, num_words))

    def _are_there(self) -> ir.Value:
        return self.b.icmp_signed(">", self.num_rows, self.b.count(0))

    def _group_of(self, row: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Its group's first row, and how many the group has."""
        b = self.b
        *larger, smallest = self._groups
        first, num = smallest.first, b.count(self._size(smallest))
        for groups in reversed(larger):
            is_here, size = b.icmp_signed("<", row, groups.end), b.count(self._size(groups))
            first, num = b.select(is_here, b.whole(row, size), first), b.select(is_here, size, num)
        return first, num

    def _size(self, groups: _Groups) -> int:
        return groups.num_vectors * self.b.lanes

    def _multiply_groups(self, groups: _Groups, first: ir.Value, last: ir.Value) -> None:
        b = self.b
        whole_end = b.plus(first, b.whole(b.sub(last, first), b.lanes))
        with b.loop(groups.first, groups.end, self._size(groups)) as row:
            with b.loop(first, whole_end, b.lanes) as output:
                with b.loop(0, b.lanes, groups.num_outputs) as n:
                    own = [b.plus(output, n, further) for further in range(groups.num_outputs)]
                    self._multiply(row, groups.num_vectors, own, first, b.at(self._results, n, FLOAT32), b.count(b.lanes))
                with b.loop(0, self._size(groups)) as n:
                    results = b.read(b.at(self._results, b.times(n, b.lanes), FLOAT32), b.floats)
                    b.write(results, self._kernel.result(b.plus(row, n), output))
            with b.loop(whole_end, last) as output:
                self._multiply(row, groups.num_vectors, [output], first, self._kernel.result(row, output), self._kernel.outputs)

    def _correction(self, output: ir.Value) -> ir.Value:
        b, weight, inputs = self.b, self._kernel.weight_row(output), self._kernel.inputs
        total = b.variable(b.all_lanes(b.words, 0))
        whole_end = b.whole(inputs, b.bytes.count)
        with b.loop(0, whole_end, b.bytes.count) as n:
            place = b.at(weight, n)
            b.prefetch(b.at(place, ASKED_BYTES))
            total.set(b.dot_of_bytes(total.get(), b.all_lanes(b.bytes, 1), b.read(place, b.bytes)))
        with b.loop(whole_end, inputs, b.lanes) as n:
            total.set(b.add(total.get(), b.sext(b.read(b.at(weight, n), ir.VectorType(BYTE, b.lanes)), b.words)))
        return b.mul(b.sum(total.get()), ir.Constant(WORD, -OFFSET))

    def _multiply(
        self,
        row: ir.Value,
        num_vectors: int,
        outputs: Sequence[ir.Value],
        first: ir.Value,
        results: ir.Value,
        row_len: ir.Value,
    ) -> None:
        """A group's rows, from `row` on, of a thread's outputs, from `first` on; to `results`, whose rows are so long."""
        b, vectors = self.b, range(num_vectors)
        corrections = b.at(self._corrections, b.sub(outputs[0], first), WORD)
        weights = [b.kept(self._kernel.weight_row(output)) for output in outputs]
        firsts = [b.spread(b.read(b.at(corrections, n, WORD), WORD)) for n in range(len(outputs))]
        sums = [[b.variable(first) for _ in vectors] for first in firsts]
        group = self._rows.codes(row)
        asked = b.at(weights[0], b.times(self._kernel.row_bytes, self._asked_outputs))
        asked_bytes = WORD_INPUTS * len(outputs)  # for each word
        with b.loop(0, b.over(self._kernel.inputs, WORD_INPUTS), UNROLLED) as first_word:
            for further in range(0, UNROLLED * asked_bytes, LINE_BYTES):
                b.prefetch(b.at(asked, b.plus(b.times(first_word, asked_bytes), further)))
            for word in (b.plus(first_word, n) for n in range(UNROLLED)):
                place = b.at(group, b.times(word, num_vectors * b.lanes), WORD)
                rows = [b.read(b.at(place, vector * b.lanes, WORD), b.bytes) for vector in vectors]
                for totals, weight in zip(sums, weights, strict=True):
                    codes = b.bitcast(b.spread(b.read(b.at(weight, word, WORD), WORD)), b.bytes)
                    for total, own in zip(totals, rows, strict=True):
                        total.set(b.dot_of_bytes(total.get(), own, codes))
        for vector in vectors:
            units = b.read(self._rows.unit(b.plus(row, vector * b.lanes)), b.floats)
            own = [self._scaled(totals[vector].get(), units, output) for totals, output in zip(sums, outputs, strict=True)]
            to = b.at(results, b.times(row_len, vector * b.lanes), FLOAT32)
            for n in range(0, len(own), OUTPUTS):
                self._write(own[n : n + OUTPUTS], b.at(to, n, FLOAT32), row_len)

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
