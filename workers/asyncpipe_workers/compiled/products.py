"""The instructions of y = x W^T + b, for weights in float32, in 16 bits (multiplied as float32), in eight and in four.

A weight is words: of 32 bits for one number of 32, four of eight or eight of four; of 16 bits for one number of 16. The words
of as many outputs as four registers have lanes are a panel: word after word, and in each word output after output. So the
weight is read once, from its beginning to its end, and no sum goes from lane to lane. A thread has some of the panels, and
multiplies each with a few rows at a time, whose sums stay in registers. Each sum is added up from the first input to the last,
however many rows there are: a row's result does not depend on what else is in the batch.

With weights in eight and four bits, rows are quantized too, each group of inputs by its own largest magnitude (with eight bits
a group is a whole row), and products are sums of integers. A NaN makes its row's results NaN.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir

from asyncpipe_workers.compiled.builder import (
    BYTE,
    FLOAT16,
    FLOAT32,
    HALF_WORD,
    NOTHING,
    WORD,
    Count,
)
from asyncpipe_workers.compiled.kernel import BYTE_FEATURES, HALF_FEATURES, Kernel

ADDRESSES = ("x", "y", "weight", "scales", "bias", "scratch")
COUNTS = ("rows", "inputs", "outputs")
"""x (rows, inputs), y (rows, outputs) and bias are float32; outputs fill the panels."""

PANEL_VECTORS = 4
TILES = (4, 2, 1)  # rows at a time: the sums of four leave half of the registers for other things
UNROLLED = 4  # words
ASKED_BYTES = 2048  # ahead: the second cache can wait for more of memory at once than the first

MAX_CODE = 127.0
TINY = 1e-30  # instead of the largest magnitude of zeros
OFFSET = 128  # of weights in eight bits: the instruction takes them unsigned
NIBBLE = 4  # bits


def panel_size(lanes: int) -> int:
    """Outputs."""
    return PANEL_VECTORS * lanes


def scratch_bytes(num_rows: int, num_inputs: int, num_groups: int) -> int:
    """For quantized rows: codes, and two words for each group."""
    return num_rows * (num_inputs + 8 * num_groups) if num_groups else 0


@dataclass(frozen=True, slots=True)
class Panel:
    weight: ir.Value
    scales: ir.Value
    first_output: ir.Value


class Product(Kernel):
    word: ClassVar[ir.IntType] = WORD
    word_inputs: ClassVar[int]

    def __init__(self, lanes: int, group_size: int | None = None) -> None:
        """`group_size` of inputs; None: all are one group."""
        self.panel_size = panel_size(lanes)
        self._group_size = group_size
        super().__init__(lanes, ADDRESSES, COUNTS)

    def build(self) -> None:
        b = self.b
        self.x, self.y, self.weight, self.scales, self.bias, self.scratch = (self.arguments[name] for name in ADDRESSES)
        self.rows, self.inputs, self.outputs = (self.arguments[name] for name in COUNTS)
        self.group_inputs = b.count(self._group_size or self.inputs)
        self.groups = b.over(self.inputs, self.group_inputs)
        self.prepare_rows()
        words = b.over(self.inputs, self.word_inputs)
        with self.shared(b.over(self.outputs, self.panel_size)) as n:
            first_output = b.times(n, self.panel_size)
            panel = Panel(b.at(self.weight, b.times(first_output, words), self.word), self.panel_scales(n), first_output)
            done: Count = 0
            for tile in TILES:
                num_tiles = b.over(b.sub(self.rows, b.count(done)), tile)
                with b.loop(0, num_tiles) as which:
                    first_row = b.plus(done, b.times(which, tile))
                    self._multiply(panel, [b.plus(first_row, row) for row in range(tile)])
                done = b.plus(done, b.times(num_tiles, tile))

    # --- what kinds of weights differ in ---

    @abstractmethod
    def prepare_rows(self) -> None: ...

    @abstractmethod
    def row_words(self, row: ir.Value) -> ir.Value:
        """The address of what is multiplied with a weight's words."""

    @abstractmethod
    def panel_scales(self, panel: ir.Value) -> ir.Value: ...

    @abstractmethod
    def first_sum(self, row: ir.Value, group: ir.Value) -> ir.Value: ...

    @abstractmethod
    def parts(self, words: ir.Value) -> Sequence[ir.Value]:
        """A vector of the weight's words as the vectors that are multiplied, one after the other, with words of a row."""

    @abstractmethod
    def add_product(self, sums: ir.Value, part: ir.Value, row_word: ir.Value) -> ir.Value: ...

    @abstractmethod
    def scaled(self, total: ir.Value, sums: ir.Value, row: ir.Value, group: ir.Value, scales: Sequence[ir.Value]) -> ir.Value:
        """`total` (floats) and what a group's sums are worth; `scales` as `group_scales` gives them."""

    @abstractmethod
    def group_scales(self, panel: Panel, group: ir.Value, vector: int) -> Sequence[ir.Value]: ...

    # --- what they have in common ---

    def _multiply(self, panel: Panel, rows: Sequence[ir.Value]) -> None:
        b = self.b
        vectors = range(PANEL_VECTORS)
        columns = [b.plus(panel.first_output, vector * self.lanes) for vector in vectors]
        totals = {
            (row, vector): b.variable(b.read(b.at(self.bias, columns[vector], FLOAT32), b.floats))
            for row in rows
            for vector in vectors
        }
        with b.loop(0, self.groups) as group:
            sums = self._sums(panel, rows, group)
            for vector in vectors:
                scales = self.group_scales(panel, group, vector)
                for row in rows:
                    total = totals[row, vector]
                    total.set(self.scaled(total.get(), sums[row, vector], row, group, scales))
        for (row, vector), total in totals.items():
            b.write(total.get(), b.at(self.y, b.plus(b.times(row, self.outputs), columns[vector]), FLOAT32))

    def _sums(self, panel: Panel, rows: Sequence[ir.Value], group: ir.Value) -> dict[tuple[ir.Value, int], ir.Value]:
        """Of one group, for each row and vector of outputs."""
        b = self.b
        sums = {(row, vector): b.variable(self.first_sum(row, group)) for row in rows for vector in range(PANEL_VECTORS)}
        words = b.over(self.group_inputs, self.word_inputs)
        first_word = b.times(group, words)
        with b.loop(first_word, b.plus(first_word, words), UNROLLED) as first:
            for word in (b.plus(first, n) for n in range(UNROLLED)):
                for vector in range(PANEL_VECTORS):
                    place = b.at(panel.weight, b.plus(b.times(word, self.panel_size), vector * self.lanes), self.word)
                    b.prefetch(b.at(place, ASKED_BYTES))
                    parts = self.parts(b.read(place, ir.VectorType(self.word, self.lanes)))
                    for n, part in enumerate(parts):
                        for row in rows:
                            row_word = b.read(b.at(self.row_words(row), b.plus(b.times(word, len(parts)), n), WORD), WORD)
                            own = sums[row, vector]
                            own.set(self.add_product(own.get(), part, b.spread(row_word)))
        return {key: own.get() for key, own in sums.items()}


class FloatProduct(Product):
    """No scales, no scratch."""

    word_inputs = 1

    def prepare_rows(self) -> None:
        """They are multiplied as they are."""

    def row_words(self, row: ir.Value) -> ir.Value:
        return self.b.at(self.x, self.b.times(row, self.inputs), FLOAT32)

    def panel_scales(self, panel: ir.Value) -> ir.Value:
        return self.scales

    def first_sum(self, row: ir.Value, group: ir.Value) -> ir.Value:
        return self.b.all_lanes(self.b.floats, 0.0)

    def parts(self, words: ir.Value) -> Sequence[ir.Value]:
        return [self.b.bitcast(words, self.b.floats)]

    def add_product(self, sums: ir.Value, part: ir.Value, row_word: ir.Value) -> ir.Value:
        return self.b.fused(part, self.b.bitcast(row_word, self.b.floats), sums)

    def group_scales(self, panel: Panel, group: ir.Value, vector: int) -> Sequence[ir.Value]:
        return []

    def scaled(self, total: ir.Value, sums: ir.Value, row: ir.Value, group: ir.Value, scales: Sequence[ir.Value]) -> ir.Value:
        return self.b.fadd(total, sums)


class Float16Product(FloatProduct):
    """Weights in float16 become float32 as they are read: half of the memory, and the same numbers."""

    features = HALF_FEATURES
    word = HALF_WORD

    def parts(self, words: ir.Value) -> Sequence[ir.Value]:
        return [self.b.fpext(self.b.bitcast(words, ir.VectorType(FLOAT16, self.lanes)), self.b.floats)]


class BFloat16Product(FloatProduct):
    """Weights in bfloat16, as in `Float16Product`: they are the first half of a float32."""

    word = HALF_WORD

    def parts(self, words: ir.Value) -> Sequence[ir.Value]:
        b = self.b
        return [b.bitcast(b.shl(b.zext(words, b.words), b.all_lanes(b.words, HALF_WORD.width)), b.floats)]


class _IntegerProduct(Product):
    """In scratch are the rows' codes (rows, inputs), then for each group of each row what its codes' unit is worth (float32),
    then the sum of its codes (int32)."""

    features = BYTE_FEATURES

    def prepare_rows(self) -> None:
        b = self.b
        num_groups = b.times(self.rows, self.groups)
        self.units = b.at(self.scratch, b.times(self.rows, self.inputs))
        self.code_sums = b.at(self.units, num_groups, FLOAT32)
        with self.own_share(num_groups) as group:
            self._quantize(group)
        b.outside("GOMP_barrier", NOTHING)

    def _quantize(self, group: ir.Value) -> None:
        """Number `group` of all groups of all rows."""
        b = self.b
        numbers = b.at(self.x, b.times(group, self.group_inputs), FLOAT32)
        codes = b.at(self.scratch, b.times(group, self.group_inputs))
        largest = b.variable(b.all_lanes(b.floats, 0.0))
        with b.loop(0, self.group_inputs, self.lanes) as n:
            magnitudes = b.magnitudes(b.read(b.at(numbers, n, FLOAT32), b.floats))
            largest.set(b.larger(largest.get(), magnitudes))
        limit = b.largest(largest.get())
        tiny = ir.Constant(FLOAT32, TINY)
        limit = b.select(b.fcmp_ordered("<", limit, tiny), tiny, limit)  # a NaN stays
        b.write(b.fdiv(limit, ir.Constant(FLOAT32, MAX_CODE)), b.at(self.units, group, FLOAT32))
        factor = b.spread(b.fdiv(ir.Constant(FLOAT32, MAX_CODE), limit))
        code_sum = b.variable(b.all_lanes(b.words, 0))
        with b.loop(0, self.group_inputs, self.lanes) as n:
            found = b.nearest(b.fmul(b.read(b.at(numbers, n, FLOAT32), b.floats), factor))
            code_sum.set(b.add(code_sum.get(), found))
            b.write(self.as_multiplied(b.trunc(found, ir.VectorType(BYTE, self.lanes))), b.at(codes, n))
        b.write(b.sum(code_sum.get()), b.at(self.code_sums, group, WORD))

    def as_multiplied(self, codes: ir.Value) -> ir.Value:
        """A row's codes in the order in which a weight's parts have them."""
        return codes

    def row_words(self, row: ir.Value) -> ir.Value:
        return self.b.at(self.scratch, self.b.times(row, self.inputs))

    def add_product(self, sums: ir.Value, part: ir.Value, row_word: ir.Value) -> ir.Value:
        return self.b.dot_of_bytes(sums, part, self.b.bitcast(row_word, self.b.bytes))

    def of_row_group(self, kept: ir.Value, row: ir.Value, group: ir.Value, of: ir.Type) -> ir.Value:
        b = self.b
        return b.spread(b.read(b.at(kept, b.plus(b.times(row, self.groups), group), of), of))


class Int8Product(_IntegerProduct):
    """Scales are float32, one for each output."""

    word_inputs = 4

    def panel_scales(self, panel: ir.Value) -> ir.Value:
        return self.b.at(self.scales, self.b.times(panel, self.panel_size), FLOAT32)

    def first_sum(self, row: ir.Value, group: ir.Value) -> ir.Value:
        """What `parts` adds too much, less than nothing."""
        code_sum = self.of_row_group(self.code_sums, row, group, WORD)
        return self.b.mul(code_sum, self.b.all_lanes(self.b.words, -OFFSET))

    def parts(self, words: ir.Value) -> Sequence[ir.Value]:
        b = self.b
        return [b.xor(b.bitcast(words, b.bytes), b.all_lanes(b.bytes, OFFSET))]

    def group_scales(self, panel: Panel, group: ir.Value, vector: int) -> Sequence[ir.Value]:
        return [self.b.read(self.b.at(panel.scales, vector * self.lanes, FLOAT32), self.b.floats)]

    def scaled(self, total: ir.Value, sums: ir.Value, row: ir.Value, group: ir.Value, scales: Sequence[ir.Value]) -> ir.Value:
        b, (scale,) = self.b, scales
        unit = self.of_row_group(self.units, row, group, FLOAT32)
        return b.fused(b.sitofp(sums, b.floats), b.fmul(scale, unit), total)


class Int4Product(_IntegerProduct):
    """The two codes of a byte are of neighbouring inputs, the even one in the high half. Scales are float16: for each group of
    a panel, its outputs' steps, then their minima (x = code * step + minimum)."""

    word_inputs = 8

    def as_multiplied(self, codes: ir.Value) -> ir.Value:
        """Of eight neighbours, those of even inputs first."""
        eights = range(0, self.lanes, self.word_inputs)
        return self.b.ordered(codes, [eight + odd + 2 * n for eight in eights for odd in range(2) for n in range(4)])

    def panel_scales(self, panel: ir.Value) -> ir.Value:
        return self.b.at(self.scales, self.b.times(panel, self.groups, 2 * self.panel_size), FLOAT16)

    def first_sum(self, row: ir.Value, group: ir.Value) -> ir.Value:
        return self.b.all_lanes(self.b.words, 0)

    def parts(self, words: ir.Value) -> Sequence[ir.Value]:
        b = self.b
        pairs = ir.VectorType(HALF_WORD, 2 * self.lanes)  # no processor shifts bytes
        shifted = b.lshr(b.bitcast(words, pairs), b.all_lanes(pairs, NIBBLE))
        return [b.and_(b.bitcast(half, b.bytes), b.all_lanes(b.bytes, (1 << NIBBLE) - 1)) for half in (shifted, words)]

    def group_scales(self, panel: Panel, group: ir.Value, vector: int) -> Sequence[ir.Value]:
        b = self.b
        steps = b.at(panel.scales, b.plus(b.times(group, 2 * self.panel_size), vector * self.lanes), FLOAT16)
        return [b.read_floats(place, FLOAT16) for place in (steps, b.at(steps, self.panel_size, FLOAT16))]

    def scaled(self, total: ir.Value, sums: ir.Value, row: ir.Value, group: ir.Value, scales: Sequence[ir.Value]) -> ir.Value:
        b, (step, minimum) = self.b, scales
        unit = self.of_row_group(self.units, row, group, FLOAT32)
        code_sum = b.sitofp(self.of_row_group(self.code_sums, row, group, WORD), b.floats)
        total = b.fused(b.sitofp(sums, b.floats), b.fmul(step, unit), total)
        return b.fused(minimum, b.fmul(code_sum, unit), total)
