"""The instructions of y = x W^T + b, for weights in float32, in 16 bits (multiplied as float32) and in eight.

A weight is read as it lies in a checkpoint, an output's row after the other: in each row as many inputs at a time as a vector
holds, so that a sum is a vector too until its row ends, and its lanes are added up then. Four rows of x (with narrow vectors
two) are multiplied with four of the weight at a time, whose sums stay in registers, and then some more rows of x with the same
four, before the next are read from memory. For one or two rows of x the weight is read from end to end. Each sum is added up in
one order, however many rows there are: a row's result does not depend on what else is in the batch.

With weights in eight bits rows are quantized too, each by its own largest magnitude, and products are sums of integers. A NaN
makes its row's results NaN.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from llvmlite import ir

from asyncpipe_workers.compiled.builder import BYTE, FLOAT16, FLOAT32, HALF_WORD, WORD
from asyncpipe_workers.compiled.kernel import BYTE_FEATURES, HALF_FEATURES
from asyncpipe_workers.compiled.many_rows import ManyRows
from asyncpipe_workers.compiled.product import ASKED_BYTES, SHARED_OUTPUTS, Product, RowCodes

FEWEST_LANES = 4  # of 32 bits: a row's end is multiplied so many at a time

OFFSET = 128  # of weights in eight bits: the instruction takes them unsigned


class _Tile(NamedTuple):
    """Rows and outputs whose sums are in registers, and the rows that come to such outputs before the next are read."""

    together: int
    rows: int
    outputs: int


def _tiles(lanes: int) -> Sequence[_Tile]:
    """Processors whose vectors are narrow have half as many registers."""
    rows = lanes // 4
    return (_Tile(16, rows, 4), _Tile(8, rows, 4), _Tile(4, rows, 4), _Tile(2, 2, 1), _Tile(1, 1, 1))


class DotProduct(Product):
    """Sums of products along rows. Inputs are a multiple of FEWEST_LANES lanes'."""

    lane_inputs: ClassVar[int]
    weight_number: ClassVar[ir.Type]
    row_number: ClassVar[ir.Type]
    asked_bytes: ClassVar[int] = ASKED_BYTES

    def multiply(self) -> None:
        b = self.b
        self.vector_inputs = self.lanes * self.lane_inputs
        self._whole_inputs = b.whole(self.inputs, self.vector_inputs)
        self.prepare_rows()
        with self.shared(b.over(b.plus(self.outputs, SHARED_OUTPUTS - 1), SHARED_OUTPUTS)) as n:
            first = b.times(n, SHARED_OUTPUTS)
            last = b.at_most(b.plus(first, SHARED_OUTPUTS), self.outputs)
            row = self.multiply_many(first, last)
            for tile in _tiles(self.lanes):
                num_rows = b.whole(b.sub(self.rows, row), tile.together)
                end = b.plus(row, num_rows)
                with b.loop(row, end, tile.together) as first_row:
                    self._multiply_rows(tile, first_row, first, last)
                row = end

    def _multiply_rows(self, tile: _Tile, first_row: ir.Value, first: ir.Value, last: ir.Value) -> None:
        """`tile.together` of them with outputs from `first` to `last`."""
        b = self.b
        whole_end = b.plus(first, b.whole(b.sub(last, first), tile.outputs))
        parts = [(first, whole_end, tile.outputs), (whole_end, last, 1)]
        for start, end, num_outputs in parts if tile.outputs > 1 else parts[:1]:
            with b.loop(start, end, num_outputs) as output, b.loop(0, tile.together, tile.rows) as n:
                self._multiply_tile(b.plus(first_row, n), tile.rows, output, num_outputs)

    def _multiply_tile(self, row: ir.Value, num_rows: int, output: ir.Value, num_outputs: int) -> None:
        b = self.b
        rows = [self.row_numbers(b.plus(row, n)) for n in range(num_rows)]
        weights = [self.weight_row(b.plus(output, n)) for n in range(num_outputs)]
        asked = self.asked_bytes if num_outputs == 1 else b.times(self.row_bytes, num_outputs)
        zero = b.all_lanes(self.sums, 0)
        sums = {(r, o): b.variable(zero) for r in range(num_rows) for o in range(num_outputs)}

        def add_products(first: ir.Value, num: int) -> None:
            numbers = [self._read(b.at(place, first, self.row_number), self.row_number, num) for place in rows]
            for o, weight in enumerate(weights):
                place = b.at(weight, first, self.weight_number)
                b.prefetch(b.at(place, asked))
                own = self.as_multiplied(self._read(place, self.weight_number, num))
                for r, number in enumerate(numbers):
                    total = sums[r, o]
                    total.set(self.add_product(total.get(), own, number))

        with b.loop(0, self._whole_inputs, self.vector_inputs) as first:
            add_products(first, self.vector_inputs)
        fewest = FEWEST_LANES * self.lane_inputs
        with b.loop(self._whole_inputs, self.inputs, fewest) as first:
            add_products(first, fewest)
        totals = self._added_up([total.get() for total in sums.values()])
        self._write(self.scaled(totals, row, output, (num_rows, num_outputs)), row, output, (num_rows, num_outputs))

    def _read(self, place: ir.Value, of: ir.Type, num: int) -> ir.Value:
        """A vector, with zeros behind the first `num`."""
        own = self.b.read(place, ir.VectorType(of, num))
        if num == self.vector_inputs:
            return own
        order = [*range(num), *[num] * (self.vector_inputs - num)]
        return self.b.picked(own, ir.Constant(own.type, None), order)

    def _added_up(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """The lanes of each: as many numbers as vectors, a power of two of at most `lanes`."""
        part = self.lanes  # lanes of one vector that are left
        while part > 1:
            pairs = [*zip(vectors[::2], vectors[1::2], strict=True)] if len(vectors) > 1 else [(vectors[0],) * 2]
            num = (2 if len(vectors) > 1 else 1) * (vectors[0].type.count // part)
            part //= 2
            first = [2 * part * n + lane for n in range(num) for lane in range(part)]
            second = [lane + part for lane in first]
            vectors = [self.add(*(self.b.picked(*pair, half) for half in (first, second))) for pair in pairs]
        return vectors[0]

    def _write(self, totals: ir.Value, row: ir.Value, output: ir.Value, tile: tuple[int, int]) -> None:
        b, (num_rows, num_outputs) = self.b, tile
        for r in range(num_rows):
            own = b.ordered(totals, range(r * num_outputs, (r + 1) * num_outputs))
            b.write(own, self.result(b.plus(row, r), output))

    def of_outputs(self, place: ir.Value, output: ir.Value, tile: tuple[int, int]) -> ir.Value:
        """The outputs' own floats, once for each row of a tile."""
        num_rows, num_outputs = tile
        own = self.b.read(self.b.at(place, output, FLOAT32), ir.VectorType(FLOAT32, num_outputs))
        return self.b.ordered(own, [*range(num_outputs)] * num_rows)

    def of_rows(self, place: ir.Value, of: ir.Type, tile: tuple[int, int]) -> ir.Value:
        """The rows' own numbers, those of the tile's first at `place`, once for each output."""
        num_rows, num_outputs = tile
        own = self.b.read(place, ir.VectorType(of, num_rows))
        return self.b.ordered(own, [row for row in range(num_rows) for _ in range(num_outputs)])

    # --- what kinds of weights differ in ---

    @property
    @abstractmethod
    def sums(self) -> ir.VectorType: ...

    @abstractmethod
    def prepare_rows(self) -> None: ...

    def multiply_many(self, first: ir.Value, last: ir.Value) -> ir.Value:
        """The first rows, if there are many, in a way of their own, with outputs from `first` to `last`; how many they were."""
        return self.b.count(0)

    @abstractmethod
    def row_numbers(self, row: ir.Value) -> ir.Value:
        """Their address."""

    @abstractmethod
    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        """Of a weight."""

    @abstractmethod
    def add_product(self, sums: ir.Value, weight: ir.Value, row: ir.Value) -> ir.Value: ...

    @abstractmethod
    def add(self, sums: ir.Value, others: ir.Value) -> ir.Value: ...

    @abstractmethod
    def scaled(self, totals: ir.Value, row: ir.Value, output: ir.Value, tile: tuple[int, int]) -> ir.Value:
        """The results, row after row, of (rows, outputs) from `row` and `output` on."""


class FloatProduct(DotProduct):
    """No scales, no scratch."""

    lane_inputs = 1
    weight_number = row_number = FLOAT32

    @property
    def sums(self) -> ir.VectorType:
        return self.b.floats

    def prepare_rows(self) -> None:
        """They are multiplied as they are."""

    def row_numbers(self, row: ir.Value) -> ir.Value:
        return self.b.at(self.x, self.b.times(row, self.inputs), FLOAT32)

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        return numbers

    def add_product(self, sums: ir.Value, weight: ir.Value, row: ir.Value) -> ir.Value:
        return self.b.fused(weight, row, sums)

    def add(self, sums: ir.Value, others: ir.Value) -> ir.Value:
        return self.b.fadd(sums, others)

    def scaled(self, totals: ir.Value, row: ir.Value, output: ir.Value, tile: tuple[int, int]) -> ir.Value:
        return self.b.fadd(self.of_outputs(self.bias, output, tile), totals)


class Float16Product(FloatProduct):
    """Weights in float16 become float32 as they are read: half of the memory, and the same numbers."""

    features = HALF_FEATURES
    weight_number = FLOAT16
    asked_bytes = ASKED_BYTES // 2  # a vector of 32 bits for each lane takes half as many, and asks as often

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        return self.b.fpext(numbers, self.b.floats)


class BFloat16Product(FloatProduct):
    """Weights in bfloat16, as in `Float16Product`: they are the first half of a float32."""

    weight_number = HALF_WORD
    asked_bytes = Float16Product.asked_bytes

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        b = self.b
        return b.bitcast(b.shl(b.zext(numbers, b.words), b.all_lanes(b.words, HALF_WORD.width)), b.floats)


class Int8Product(DotProduct):
    """Scales are float32, one for each output. Scratch is as `RowCodes` says, a group for each row."""

    features = BYTE_FEATURES
    lane_inputs = 4
    weight_number = row_number = BYTE

    @property
    def sums(self) -> ir.VectorType:
        return self.b.words

    def prepare_rows(self) -> None:
        self._rows = RowCodes(self, self.inputs)
        self._many = ManyRows(self, self._rows)
        self._rows.write(self._many.keep)

    def multiply_many(self, first: ir.Value, last: ir.Value) -> ir.Value:
        self._many.multiply(first, last)
        return self._many.num_rows

    def row_numbers(self, row: ir.Value) -> ir.Value:
        return self._rows.codes(row)

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        return self.b.xor(numbers, self.b.all_lanes(self.b.bytes, OFFSET))

    def add_product(self, sums: ir.Value, weight: ir.Value, row: ir.Value) -> ir.Value:
        return self.b.dot_of_bytes(sums, weight, row)

    def add(self, sums: ir.Value, others: ir.Value) -> ir.Value:
        return self.b.add(sums, others)

    def scaled(self, totals: ir.Value, row: ir.Value, output: ir.Value, tile: tuple[int, int]) -> ir.Value:
        b, num = self.b, tile[0] * tile[1]
        code_sums = self.of_rows(self._rows.code_sum(row), WORD, tile)
        too_much = b.mul(code_sums, b.all_lanes(code_sums.type, OFFSET))
        products = b.sitofp(b.sub(totals, too_much), ir.VectorType(FLOAT32, num))
        scales = b.fmul(self.of_outputs(self.scales, output, tile), self.of_rows(self._rows.unit(row), FLOAT32, tile))
        return b.fused(products, scales, self.of_outputs(self.bias, output, tile))
