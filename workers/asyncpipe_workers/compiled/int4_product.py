"""The instructions of y = x W^T + b for weights in four bits.

A weight is words of 32 bits, eight codes each. The words of as many outputs as four registers have lanes are a panel: word
after word, and in each word output after output. So no sum goes from lane to lane, which would take too long for groups that
end after a few words. A thread has some of the panels, and multiplies each with a few rows at a time, whose sums stay in
registers. Each sum is added up from the first input to the last, however many rows there are.

Rows are quantized as they come, each group of inputs by its own largest magnitude, and products are sums of integers. A NaN
makes its row's results NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from asyncpipe_workers.compiled.builder import FLOAT16, FLOAT32, HALF_WORD, WORD, Count
from asyncpipe_workers.compiled.kernel import BYTE_FEATURES, WORD_FEATURES
from asyncpipe_workers.compiled.product import ASKED_BYTES, Product, RowCodes

PANEL_VECTORS = 4
TILES = (4, 2, 1)  # rows at a time: the sums of four leave half of the registers for other things
UNROLLED = 4  # words
WORD_INPUTS = 8
NIBBLE = 4  # bits


def panel_size(lanes: int) -> int:
    """Outputs."""
    return PANEL_VECTORS * lanes


@dataclass(frozen=True, slots=True)
class _Panel:
    weight: ir.Value
    scales: ir.Value
    first_output: ir.Value


class Int4Product(Product):
    """The two codes of a byte are of neighbouring inputs, the even one in the high half. Scales are float16: for each group of
    a panel, its outputs' steps, then their minima (x = code * step + minimum). Outputs fill the panels."""

    features = BYTE_FEATURES

    def __init__(self, lanes: int, group_size: int) -> None:
        """`group_size` of inputs."""
        self._panel_size = panel_size(lanes)
        self._group_size = group_size
        super().__init__(lanes)

    def multiply(self) -> None:
        b = self.b
        self._rows = RowCodes(self, self._group_size)
        self._rows.write(self._keep)
        words = b.over(self.inputs, WORD_INPUTS)
        with self.shared(b.over(self.outputs, self._panel_size)) as n:
            first_output = b.times(n, self._panel_size)
            weight = b.at(self.weight, b.times(first_output, words), WORD)
            scales = b.at(self.scales, b.times(n, self._rows.groups, 2 * self._panel_size), FLOAT16)
            done: Count = 0
            for tile in TILES:
                num_tiles = b.over(b.sub(self.rows, b.count(done)), tile)
                with b.loop(0, num_tiles) as which:
                    first_row = b.plus(done, b.times(which, tile))
                    self._multiply(_Panel(weight, scales, first_output), [b.plus(first_row, row) for row in range(tile)])
                done = b.plus(done, b.times(num_tiles, tile))

    def _multiply(self, panel: _Panel, rows: Sequence[ir.Value]) -> None:
        b = self.b
        vectors = range(PANEL_VECTORS)
        columns = [b.plus(panel.first_output, vector * self.lanes) for vector in vectors]
        totals = {
            (row, vector): b.variable(b.read(b.at(self.bias, columns[vector], FLOAT32), b.floats))
            for row in rows
            for vector in vectors
        }
        with b.loop(0, self._rows.groups) as group:
            sums = self._sums(panel, rows, group)
            for vector in vectors:
                scales = self._group_scales(panel, group, vector)
                for row in rows:
                    total = totals[row, vector]
                    total.set(self._scaled(total.get(), sums[row, vector], row, group, scales))
        for (row, vector), total in totals.items():
            b.write(total.get(), self.result(row, columns[vector]))

    def _sums(self, panel: _Panel, rows: Sequence[ir.Value], group: ir.Value) -> dict[tuple[ir.Value, int], ir.Value]:
        """Of one group, for each row and vector of outputs."""
        b = self.b
        zero = b.all_lanes(b.words, 0)
        sums = {(row, vector): b.variable(zero) for row in rows for vector in range(PANEL_VECTORS)}
        words = self._group_size // WORD_INPUTS
        first_word = b.times(group, words)
        with b.loop(first_word, b.plus(first_word, words), UNROLLED) as first:
            for word in (b.plus(first, n) for n in range(UNROLLED)):
                for vector in range(PANEL_VECTORS):
                    place = b.at(panel.weight, b.plus(b.times(word, self._panel_size), vector * self.lanes), WORD)
                    b.prefetch(b.at(place, ASKED_BYTES))
                    for n, part in enumerate(self._parts(b.read(place, b.words))):
                        for row in rows:
                            own_word = b.read(b.at(self._rows.codes(row), b.plus(b.times(word, 2), n), WORD), WORD)
                            own = sums[row, vector]
                            own.set(b.dot_of_bytes(own.get(), part, b.bitcast(b.spread(own_word), b.bytes)))
        return {key: own.get() for key, own in sums.items()}

    def _keep(self, codes: ir.Value, group: ir.Value, first: ir.Value) -> None:
        """A row's codes in the order in which a weight's parts have them: of eight neighbours, those of even inputs first."""
        eights = range(0, self.lanes, WORD_INPUTS)
        order = [eight + odd + 2 * n for eight in eights for odd in range(2) for n in range(4)]
        self._rows.keep(self.b.ordered(codes, order), group, first)

    def _parts(self, words: ir.Value) -> Sequence[ir.Value]:
        """A vector of the weight's words as the two that are multiplied, one after the other, with words of a row."""
        b = self.b
        pairs = ir.VectorType(HALF_WORD, 2 * self.lanes)  # no processor shifts bytes
        shifted = b.lshr(b.bitcast(words, pairs), b.all_lanes(pairs, NIBBLE))
        return [b.and_(b.bitcast(half, b.bytes), b.all_lanes(b.bytes, (1 << NIBBLE) - 1)) for half in (shifted, words)]

    def _group_scales(self, panel: _Panel, group: ir.Value, vector: int) -> tuple[ir.Value, ir.Value]:
        b = self.b
        steps = b.at(panel.scales, b.plus(b.times(group, 2 * self._panel_size), vector * self.lanes), FLOAT16)
        return b.read_floats(steps, FLOAT16), b.read_floats(b.at(steps, self._panel_size, FLOAT16), FLOAT16)

    def _scaled(
        self, total: ir.Value, sums: ir.Value, row: ir.Value, group: ir.Value, scales: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        """`total` and what a group's sums are worth."""
        b, (step, minimum) = self.b, scales
        unit = b.spread(b.read(self._rows.unit(row, group), FLOAT32))
        code_sum = b.sitofp(b.spread(b.read(self._rows.code_sum(row, group), WORD)), b.floats)
        total = b.fused(b.sitofp(sums, b.floats), b.fmul(step, unit), total)
        return b.fused(minimum, b.fmul(code_sum, unit), total)


class WidenedInt4Product(Int4Product):
    """The same, where bytes are multiplied as numbers of 16 bits."""

    features = WORD_FEATURES
    multiplies_bytes = False
