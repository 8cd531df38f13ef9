"""Many rows where bytes are multiplied, which takes a fifth to a third of the time of products along rows.

The instruction takes codes of rows as unsigned, 128 more than they are; what that adds to an output's sums is taken away
beforehand. While outputs are multiplied, the weight's rows are asked for that the thread will probably come to next.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from asyncpipe_workers.compiled.builder import BYTE, FLOAT32, LINE_BYTES, WORD
from asyncpipe_workers.compiled.product import ASKED_BYTES, SHARED_OUTPUTS, Product, RowCodes
from asyncpipe_workers.compiled.turned_rows import OUTPUTS, UNROLLED, Groups, TurnedRows

OFFSET = 128


class ManyRows(TurnedRows):
    word_inputs = 4

    def __init__(self, kernel: Product, rows: RowCodes) -> None:
        super().__init__(kernel, rows)
        largest = self._groups[0]
        self._asked_outputs = self.b.times(SHARED_OUTPUTS, kernel.num_threads())
        self._corrections = self.b.room(SHARED_OUTPUTS, WORD)
        self._results = self.b.room(self._size(largest) * kernel.lanes, FLOAT32)

    def _as_words(self, codes: ir.Value) -> ir.Value:
        """Unsigned."""
        b = self.b
        return b.bitcast(b.xor(codes, b.all_lanes(codes.type, OFFSET)), ir.VectorType(WORD, b.lanes // self.word_inputs))

    def _multiply_all(self, first: ir.Value, last: ir.Value) -> None:
        b = self.b
        with b.loop(first, last) as output:
            b.write(self._correction(output), b.at(self._corrections, b.sub(output, first), WORD))
        for groups in self._groups:
            self._multiply_groups(groups, first, last)

    def _multiply_groups(self, groups: Groups, first: ir.Value, last: ir.Value) -> None:
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
        asked_bytes = self.word_inputs * len(outputs)  # for each word
        with b.loop(0, b.over(self._kernel.inputs, self.word_inputs), UNROLLED) as first_word:
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
            units = self._units(b.plus(row, vector * b.lanes))
            own = [self._scaled(totals[vector].get(), units, output) for totals, output in zip(sums, outputs, strict=True)]
            to = b.at(results, b.times(row_len, vector * b.lanes), FLOAT32)
            for n in range(0, len(own), OUTPUTS):
                self._write(own[n : n + OUTPUTS], b.at(to, n, FLOAT32), row_len)
