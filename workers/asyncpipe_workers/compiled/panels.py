"""The instructions that lay a weight's words out in panels, as `int4_product` reads them.

That is to turn a matrix. A thread has some of the panels, and turns squares within its registers: two thirds of torch's
time.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from asyncpipe_workers.compiled.builder import WORD
from asyncpipe_workers.compiled.kernel import Kernel


class LayOutPanels(Kernel):
    """Words (O, W), whose rows are `row_bytes` apart, to panels (P, W, C) of C = `panel_size` outputs, which is a multiple of
    `lanes`; the last panel is filled up with zeros."""

    def __init__(self, lanes: int, panel_size: int) -> None:
        self._panel_size = panel_size
        super().__init__(lanes, ("words", "panels"), ("outputs", "row_words", "row_bytes"))

    def build(self) -> None:
        b, size, lanes = self.b, self._panel_size, self.lanes
        _, panels, outputs, row_words, _ = self.arguments.values()
        whole_words = b.whole(row_words, lanes)
        with self.shared(b.over(b.plus(outputs, size - 1), size)) as which:
            panel = b.at(panels, b.times(which, row_words, size), WORD)
            first = b.times(which, size)
            num = b.at_most(b.sub(outputs, first), size)
            whole_outputs = b.whole(num, lanes)
            with b.loop(0, whole_words, lanes) as word, b.loop(0, whole_outputs, lanes) as output:
                self._turn(panel, first, word, output)
            with b.loop(whole_words, row_words) as word, b.loop(0, whole_outputs) as output:
                self._copy(panel, first, word, output)
            with b.loop(0, row_words) as word:
                with b.loop(whole_outputs, num) as output:
                    self._copy(panel, first, word, output)
                with b.loop(num, size) as output:
                    b.write(ir.Constant(WORD, 0), self._place(panel, word, output))

    def _turn(self, panel: ir.Value, first: ir.Value, word: ir.Value, output: ir.Value) -> None:
        """As many words from `word` on of as many outputs from `output` on as there are lanes."""
        b, vector = self.b, self.b.words
        rows = [b.read(self._source(first, word, b.plus(output, n)), vector) for n in range(self.lanes)]
        for n, column in enumerate(self._turned(rows)):
            b.write(column, self._place(panel, b.plus(word, n), output))

    def _turned(self, rows: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Rows of a square to its columns: to shuffle the two halves of them together, as often as halves can be halved."""
        half = self.lanes // 2
        for _ in range(half.bit_length()):
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [self._shuffled(*pair, start) for pair in pairs for start in (0, half)]
        return rows

    def _shuffled(self, a: ir.Value, b: ir.Value, start: int) -> ir.Value:
        """Lanes of a and of b by turns, from lane `start` on."""
        order = [start + lane // 2 + lane % 2 * self.lanes for lane in range(self.lanes)]
        return self.b.picked(a, b, order)

    def _copy(self, panel: ir.Value, first: ir.Value, word: ir.Value, output: ir.Value) -> None:
        own = self.b.read(self._source(first, word, output), WORD)
        self.b.write(own, self._place(panel, word, output))

    def _source(self, first: ir.Value, word: ir.Value, output: ir.Value) -> ir.Value:
        b = self.b
        row = b.at(self.arguments["words"], b.times(b.plus(first, output), self.arguments["row_bytes"]))
        return b.at(row, word, WORD)

    def _place(self, panel: ir.Value, word: ir.Value, output: ir.Value) -> ir.Value:
        return self.b.at(panel, self.b.plus(self.b.times(word, self._panel_size), output), WORD)
