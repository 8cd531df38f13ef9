"""Products in eight bits for many rows of inputs: vectors are of rows, and a weight's words go to all of their lanes.

Rows are turned as they are quantized: those of a few vectors are a group, in which each four inputs of all of its rows come
after each other. So no sum goes from lane to lane, which takes a fifth of the time of products along rows, and the result is
the same to the last bit. The instruction takes codes of rows as unsigned, 128 more than they are; what that adds to an output's
sums is taken away beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from asyncpipe_workers.compiled.builder import BYTE, FLOAT32, WORD
from asyncpipe_workers.compiled.product import ASKED_BYTES, SHARED_OUTPUTS, Product, RowCodes

OUTPUTS = 4  # whose sums are in registers
WORD_INPUTS = 4
UNROLLED = 4  # words
OFFSET = 128


class ManyRows:
    def __init__(self, kernel: Product, rows: RowCodes) -> None:
        """As many as fill groups are taken from the first on; inputs are a multiple of UNROLLED words'."""
        self.b = kernel.b
        self._kernel = kernel
        self._rows = rows
        self._vectors = range(kernel.lanes // 4)
        self._group_rows = len(self._vectors) * kernel.lanes
        self.num_rows = self.b.whole(kernel.rows, self._group_rows)
        self._corrections = self.b.room(SHARED_OUTPUTS, WORD)
        self._results = self.b.room(self._group_rows * kernel.lanes, FLOAT32)

    def keep(self, codes: ir.Value, row: ir.Value, first: ir.Value) -> None:
        b = self.b
        with b.if_else(b.icmp_signed("<", row, self.num_rows)) as (turned, others):
            with turned:
                unsigned = b.xor(codes, b.all_lanes(codes.type, OFFSET))
                num_words = codes.type.count // WORD_INPUTS
                words = b.bitcast(unsigned, ir.VectorType(WORD, num_words))
                own = b.at(self._group(row), b.urem(row, b.count(self._group_rows)), WORD)
                for n in range(num_words):
                    place = b.times(b.plus(b.over(first, WORD_INPUTS), n), self._group_rows)
                    b.write(b.extract_element(words, ir.Constant(WORD, n)), b.at(own, place, WORD))
            with others:
                self._rows.keep(codes, row, first)

    def multiply(self, first: ir.Value, last: ir.Value) -> None:
        """With outputs from `first` to `last`, SHARED_OUTPUTS at most."""
        b = self.b
        whole_end = b.plus(first, b.whole(b.sub(last, first), b.lanes))
        with b.if_then(b.icmp_signed(">", self.num_rows, b.count(0))):
            with b.loop(first, last) as output:
                b.write(self._correction(output), b.at(self._corrections, b.sub(output, first), WORD))
            with b.loop(0, self.num_rows, self._group_rows) as row:
                with b.loop(first, whole_end, b.lanes) as output:
                    with b.loop(0, b.lanes, OUTPUTS) as n:
                        own = [b.plus(output, n, further) for further in range(OUTPUTS)]
                        self._multiply(row, own, first, b.at(self._results, n, FLOAT32), b.count(b.lanes))
                    with b.loop(0, self._group_rows) as n:
                        results = b.read(b.at(self._results, b.times(n, b.lanes), FLOAT32), b.floats)
                        b.write(results, self._kernel.result(b.plus(row, n), output))
                with b.loop(whole_end, last) as output:
                    self._multiply(row, [output], first, self._kernel.result(row, output), self._kernel.outputs)

    def _group(self, row: ir.Value) -> ir.Value:
        """Where the codes of the row's group are."""
        return self._rows.codes(self.b.whole(row, self._group_rows))

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
        self, row: ir.Value, outputs: Sequence[ir.Value], first: ir.Value, results: ir.Value, row_len: ir.Value
    ) -> None:
        """A group's rows, from `row` on, of a thread's outputs, from `first` on; to `results`, whose rows are so long."""
        b = self.b
        corrections = b.at(self._corrections, b.sub(outputs[0], first), WORD)
        weights = [self._kernel.weight_row(output) for output in outputs]
        firsts = [b.spread(b.read(b.at(corrections, n, WORD), WORD)) for n in range(len(outputs))]
        sums = [[b.variable(first) for _ in self._vectors] for first in firsts]
        group = self._group(row)
        with b.loop(0, b.over(self._kernel.inputs, WORD_INPUTS), UNROLLED) as first_word:
            for word in (b.plus(first_word, n) for n in range(UNROLLED)):
                place = b.at(group, b.times(word, self._group_rows), WORD)
                rows = [b.read(b.at(place, vector * b.lanes, WORD), b.bytes) for vector in self._vectors]
                for totals, weight in zip(sums, weights, strict=True):
                    codes = b.bitcast(b.spread(b.read(b.at(weight, word, WORD), WORD)), b.bytes)
                    for total, own in zip(totals, rows, strict=True):
                        total.set(b.dot_of_bytes(total.get(), own, codes))
        for vector in self._vectors:
            units = b.read(self._rows.unit(b.plus(row, vector * b.lanes)), b.floats)
            own = [self._scaled(totals[vector].get(), units, output) for totals, output in zip(sums, outputs, strict=True)]
            self._write(own, b.at(results, b.times(row_len, vector * b.lanes), FLOAT32), row_len)

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
