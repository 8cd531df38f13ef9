"""Many rows where only numbers of 16 bits are multiplied: rows are kept so, and weights become so once for all rows.

A block of the inputs of a thread's outputs is widened into the second cache. All rows come to it, and their sums wait in
scratch for the next block. What is left for the inner loop are two instructions for each vector of products and nothing else:
widening in it took a third of its time.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from asyncpipe_workers.compiled.builder import BYTE, HALF_WORD, WORD
from asyncpipe_workers.compiled.product import SHARED_OUTPUTS, Product, RowCodes
from asyncpipe_workers.compiled.turned_rows import UNROLLED, Groups, TurnedRows

BLOCK_INPUTS = 512  # of SHARED_OUTPUTS: 64 KB
ASKED_OUTPUTS = 4  # ahead
STEP_INPUTS = 16  # that are widened at a time: whole numbers of them fill inputs and blocks


def sums_bytes(num_rows: int, num_threads: int) -> int:
    """Of scratch, behind that of `RowCodes`."""
    return 4 * num_rows * SHARED_OUTPUTS * num_threads


class WidenedRows(TurnedRows):
    """Inputs are a multiple of STEP_INPUTS."""

    word_inputs = 2
    fewest_rows = 32  # fewer are multiplied as quickly where they lie
    num_sizes = 1  # what is left of rows is not turned

    def __init__(self, kernel: Product, rows: RowCodes) -> None:
        super().__init__(kernel, rows)
        b = self.b
        self._weights = b.room(SHARED_OUTPUTS * BLOCK_INPUTS, HALF_WORD)
        self._sums = b.at(rows.rest, b.times(kernel.thread(), kernel.rows, SHARED_OUTPUTS), WORD)

    def _as_words(self, codes: ir.Value) -> ir.Value:
        return self.b.bitcast(codes, ir.VectorType(WORD, self.b.lanes // self.word_inputs))

    def _multiply_all(self, first: ir.Value, last: ir.Value) -> None:
        b, num = self.b, self.b.sub(last, first)
        with b.loop(0, self._kernel.inputs, BLOCK_INPUTS) as start:
            num_inputs = b.at_most(b.sub(self._kernel.inputs, start), BLOCK_INPUTS)
            with b.loop(0, num) as n:
                self._widen(b.plus(first, n), n, start, num_inputs)
            for groups in self._groups:
                with b.loop(groups.first, groups.end, self._size(groups)) as row:
                    whole_end = b.whole(num, groups.num_outputs)
                    with b.loop(0, whole_end, groups.num_outputs) as n:
                        self._add_products(row, groups, [b.plus(n, m) for m in range(groups.num_outputs)], start, num_inputs)
                    with b.loop(whole_end, num) as n:
                        self._add_products(row, groups, [n], start, num_inputs)
        for groups in self._groups:
            with b.loop(groups.first, groups.end, self._size(groups)) as row:
                self._give_results(row, groups, first, num)

    def _widen(self, output: ir.Value, n: ir.Value, start: ir.Value, num_inputs: ir.Value) -> None:
        """Inputs from `start` on of an output, the thread's own number `n`."""
        b = self.b
        weight, own = b.at(self._kernel.weight_row(output), start), self._widened(n)
        asked = b.times(self._kernel.row_bytes, ASKED_OUTPUTS)
        with b.loop(0, num_inputs, STEP_INPUTS) as i:
            place = b.at(weight, i)
            b.prefetch(b.at(place, asked))
            codes = b.read(place, ir.VectorType(BYTE, STEP_INPUTS))
            b.write(b.sext(codes, ir.VectorType(HALF_WORD, STEP_INPUTS)), b.at(own, i, HALF_WORD))

    def _widened(self, n: ir.Value) -> ir.Value:
        """Their address, of the thread's own output number `n`."""
        return self.b.at(self._weights, self.b.times(n, BLOCK_INPUTS), HALF_WORD)

    def _add_products(
        self, row: ir.Value, groups: Groups, own: Sequence[ir.Value], start: ir.Value, num_inputs: ir.Value
    ) -> None:
        """A group's rows, from `row` on, times a block of the thread's own outputs, to their sums; inputs begin at `start`."""
        b, vectors = self.b, range(groups.num_vectors)
        places = [[self._sum(row, groups, n, vector) for vector in vectors] for n in own]
        sums = [[b.variable(b.all_lanes(b.words, 0)) for _ in vectors] for _ in own]
        with b.if_then(b.icmp_signed(">", start, b.count(0))):
            for totals, each in zip(sums, places, strict=True):
                for total, place in zip(totals, each, strict=True):
                    total.set(b.read(place, b.words))
        weights = [b.kept(self._widened(n)) for n in own]
        block = b.at(self._rows.codes(row), b.times(b.over(start, self.word_inputs), self._size(groups)), WORD)
        with b.loop(0, b.over(num_inputs, self.word_inputs), UNROLLED) as first_word:
            for word in (b.plus(first_word, n) for n in range(UNROLLED)):
                place = b.at(block, b.times(word, self._size(groups)), WORD)
                rows = [b.read(b.at(place, vector * b.lanes, WORD), b.pairs) for vector in vectors]
                for totals, weight in zip(sums, weights, strict=True):
                    codes = b.bitcast(b.spread(b.read(b.at(weight, word, WORD), WORD)), b.pairs)
                    for total, each_row in zip(totals, rows, strict=True):
                        total.set(b.dot_of_pairs(total.get(), each_row, codes))
        for totals, each in zip(sums, places, strict=True):
            for total, place in zip(totals, each, strict=True):
                b.write(total.get(), place)

    def _sum(self, row: ir.Value, groups: Groups, n: ir.Value, vector: int) -> ir.Value:
        """The address of those of a vector of a group's rows, and the thread's own output number `n`."""
        b = self.b
        return b.at(self._sums, b.plus(b.times(row, SHARED_OUTPUTS), b.times(n, self._size(groups)), vector * b.lanes), WORD)

    def _give_results(self, row: ir.Value, groups: Groups, first: ir.Value, num: ir.Value) -> None:
        """Of a group's rows, from `row` on, and `num` outputs from `first` on."""
        b, whole_end = self.b, self.b.whole(num, self.b.lanes)
        for vector in range(groups.num_vectors):
            own_row = b.plus(row, vector * b.lanes)
            units = self._units(own_row)

            def give(
                outputs: Sequence[ir.Value], *, vector: int = vector, row_: ir.Value = own_row, units: ir.Value = units
            ) -> None:
                sums = [b.read(self._sum(row, groups, n, vector), b.words) for n in outputs]
                results = [self._scaled(each, units, b.plus(first, n)) for each, n in zip(sums, outputs, strict=True)]
                self._write(results, self._kernel.result(row_, b.plus(first, outputs[0])), self._kernel.outputs)

            with b.loop(0, whole_end, b.lanes) as n:
                give([b.plus(n, further) for further in range(b.lanes)])
            with b.loop(whole_end, num) as n:
                give([n])
