"""The instructions of y = x W^T + b, for weights in float32, in 16 bits (multiplied as float32) and in eight.

A weight is read as it lies in a checkpoint, an output's row after the other: in each row as many inputs at a time as a vector
holds, so that a sum is a vector too until its row ends, and its lanes are added up then. Some rows of x are multiplied with
some of the weight at a time, whose sums stay in registers: four with four, or of floats eight with two (with narrow vectors
half as many), for then rows of x stay in the first cache and those of the weight pass by once. Where rows are long, that is
done for a block of their inputs after the other. For one or two rows of x the weight is read from end to end. Each sum is added
up in one order, however many rows there are: a row's result does not depend on what else is in the batch.

With weights in eight bits rows are quantized too, each by its own largest magnitude, and products are sums of integers. A NaN
makes its row's results NaN.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

from llvmlite import ir

from asyncpipe_workers.compiled.builder import BYTE, FLOAT16, FLOAT32, HALF_WORD, WORD, Variable
from asyncpipe_workers.compiled.kernel import BYTE_FEATURES, HALF_FEATURES, WORD_FEATURES
from asyncpipe_workers.compiled.many_rows import ManyRows
from asyncpipe_workers.compiled.product import ASKED_BYTES, SHARED_OUTPUTS, Product, RowCodes
from asyncpipe_workers.compiled.turned_rows import TurnedRows
from asyncpipe_workers.compiled.widened_rows import WidenedRows

FEWEST_LANES = 4  # of 32 bits: a row's end is multiplied so many at a time
MANY = 8  # rows, and more, are multiplied in blocks of their inputs where they are long
MOST = 12  # rows that stay in the first cache together; sixteen would not
BLOCK_VECTORS = 48  # of each row: eight of them in 24 KB
ALIKE_FLOATS = 1024  # numbers that lie so far from each other compete for the same places of the first cache

FLOAT_BYTES = 4

OFFSET = 128  # of weights in eight bits: the instruction takes them unsigned


class Tile(NamedTuple):
    """Rows and outputs whose sums are in registers."""

    row: ir.Value
    num_rows: int
    output: ir.Value
    num_outputs: int


class Together(NamedTuple):
    """So many rows come to a weight together, multiplied in tiles of so many of them and of outputs."""

    num_rows: int
    tile_rows: int
    tile_outputs: int


ONES = (Together(2, 2, 1), Together(1, 1, 1))
FEW: dict[int, Sequence[Together]] = {16: (Together(4, 4, 4), *ONES), 8: (Together(4, 2, 4), *ONES)}  # by lanes of a vector


class _Part(NamedTuple):
    """Rows that are multiplied together, and outputs from `first` to `last`."""

    first_row: ir.Value
    num_rows: int
    first: ir.Value
    last: ir.Value


def moved_bytes(num_rows: int, num_inputs: int, lanes: int) -> int:
    """Of scratch for the rows of a `FloatProduct`."""
    block_inputs = BLOCK_VECTORS * lanes
    if num_rows < MANY or num_inputs <= block_inputs:
        return 0
    return FLOAT_BYTES * num_rows * (num_inputs + ALIKE_FLOATS + block_inputs)


class DotProduct(Product):
    """Sums of products along rows. Inputs are a multiple of FEWEST_LANES lanes'."""

    lane_inputs: ClassVar[int]
    weight_number: ClassVar[ir.Type]
    row_number: ClassVar[ir.Type]
    asked_outputs: ClassVar[int] = 4  # ahead at least, where several are multiplied together
    many: ClassVar[dict[int, Sequence[Together]]] = {16: (Together(MANY, 4, 4),), 8: (Together(MANY, 2, 4),)}

    def multiply(self) -> None:
        b = self.b
        self.vector_inputs = self.lanes * self.lane_inputs
        self._whole_inputs = b.whole(self.inputs, self.vector_inputs)
        self._block_inputs = BLOCK_VECTORS * self.vector_inputs
        self._kept_sums = b.room(MOST * SHARED_OUTPUTS * self.lanes, WORD)
        self.prepare_rows()
        with self.shared(b.over(b.plus(self.outputs, SHARED_OUTPUTS - 1), SHARED_OUTPUTS)) as n:
            first = b.times(n, SHARED_OUTPUTS)
            last = b.at_most(b.plus(first, SHARED_OUTPUTS), self.outputs)
            row = self.multiply_many(first, last)
            for together in (*self.many[self.lanes], *FEW[self.lanes]):
                end = b.plus(row, b.whole(b.sub(self.rows, row), together.num_rows))
                with b.loop(row, end, together.num_rows) as first_row:
                    self._multiply_rows(_Part(first_row, together.num_rows, first, last), together)
                row = end

    def _multiply_rows(self, part: _Part, together: Together) -> None:
        b, (_, rows, outputs) = self.b, together
        if outputs == 1:
            self._multiply_tiles(part, rows, 1)
            return
        whole_end = b.plus(part.first, b.whole(b.sub(part.last, part.first), outputs))
        whole, rest = part._replace(last=whole_end), part._replace(first=whole_end)
        if part.num_rows < MANY:
            self._multiply_tiles(whole, rows, outputs)
        else:
            with b.if_else(b.icmp_signed(">", self.inputs, b.count(self._block_inputs))) as (several, one):
                with several:
                    self._multiply_in_blocks(whole, rows, outputs)
                with one:
                    self._multiply_tiles(whole, rows, outputs)
        self._multiply_tiles(rest, rows, 1)

    def _multiply_tiles(self, part: _Part, rows: int, outputs: int) -> None:
        with self._tiles(part, rows, outputs) as tile:
            sums = self._no_sums(tile)
            self._add_products(tile, sums, self.b.count(0), self._whole_inputs)
            self._finish(tile, sums)

    def _multiply_in_blocks(self, part: _Part, rows: int, outputs: int) -> None:
        """Of inputs, one after the other: a tile's sums are kept until it comes to the next."""
        b = self.b
        with b.loop(0, self.inputs, self._block_inputs) as start, self._tiles(part, rows, outputs) as tile:
            end, sums = b.plus(start, self._block_inputs), self._no_sums(tile)
            before = b.plus(
                b.times(b.sub(tile.row, part.first_row), SHARED_OUTPUTS), b.times(b.sub(tile.output, part.first), rows)
            )
            kept = [b.at(self._kept_sums, b.times(b.plus(before, n), self.lanes), WORD) for n in range(len(sums))]
            with b.if_then(b.icmp_signed(">", start, b.count(0))):
                for total, place in zip(sums, kept, strict=True):
                    total.set(b.read(place, self.sums))
            self._add_products(tile, sums, start, b.at_most(end, self._whole_inputs))
            with b.if_else(b.icmp_signed("<", end, self.inputs)) as (unfinished, finished):
                with unfinished:
                    for total, place in zip(sums, kept, strict=True):
                        b.write(total.get(), place)
                with finished:
                    self._finish(tile, sums)

    @contextmanager
    def _tiles(self, part: _Part, rows: int, outputs: int) -> Iterator[Tile]:
        """All rows of a part come to some outputs before the next of its outputs are read."""
        b = self.b
        with b.loop(part.first, part.last, outputs) as output, b.loop(0, part.num_rows, rows) as n:
            yield Tile(b.plus(part.first_row, n), rows, output, outputs)

    def _no_sums(self, tile: Tile) -> list[Variable]:
        """Of nothing yet."""
        return [self.b.variable(self.b.all_lanes(self.sums, 0)) for _ in range(tile.num_rows * tile.num_outputs)]

    def _finish(self, tile: Tile, sums: Sequence[Variable]) -> None:
        """After all whole vectors of inputs."""
        self._add_products(tile, sums, self._whole_inputs, self.inputs, num=FEWEST_LANES * self.lane_inputs)
        done = 0
        while rest := tile.num_rows - done:  # sums are added up by powers of two
            num_rows = min(1 << rest.bit_length() - 1, self.lanes // tile.num_outputs)
            part = tile._replace(row=self.b.plus(tile.row, done), num_rows=num_rows)
            own = sums[done * tile.num_outputs : (done + num_rows) * tile.num_outputs]
            self._write(self.scaled(self.b.sums([total.get() for total in own]), part), part)
            done += num_rows

    def _add_products(
        self, tile: Tile, sums: Sequence[Variable], first: ir.Value, last: ir.Value, *, num: int | None = None
    ) -> None:
        """Of inputs from `first` to `last`, `num` at a time: a vector of them if nothing is said."""
        b, num = self.b, num or self.vector_inputs
        rows = [self.row_numbers(b.plus(tile.row, n)) for n in range(tile.num_rows)]
        weights = [self.weight_row(b.plus(tile.output, n)) for n in range(tile.num_outputs)]
        several = b.times(self.row_bytes, max(tile.num_outputs, self.asked_outputs))
        asked = ASKED_BYTES if tile.num_outputs == 1 else several

        def weight_numbers(weight: ir.Value, n: ir.Value) -> ir.Value:
            place = b.at(weight, n, self.weight_number)
            b.prefetch(b.at(place, asked))
            return self.as_multiplied(self._read(place, self.weight_number, num))

        def add(r: int, o: int, weight: ir.Value, number: ir.Value) -> None:
            total = sums[r * tile.num_outputs + o]
            total.set(self.add_product(total.get(), weight, number))

        with b.loop(first, last, num) as n:
            if tile.num_rows > tile.num_outputs:  # what there is less of waits in registers
                held = [weight_numbers(weight, n) for weight in weights]
                for r, row in enumerate(rows):
                    number = self._read(b.at(row, n, self.row_number), self.row_number, num)
                    for o, own in enumerate(held):
                        add(r, o, own, number)
            else:
                numbers = [self._read(b.at(row, n, self.row_number), self.row_number, num) for row in rows]
                for o, weight in enumerate(weights):
                    own = weight_numbers(weight, n)
                    for r, number in enumerate(numbers):
                        add(r, o, own, number)

    def _read(self, place: ir.Value, of: ir.Type, num: int) -> ir.Value:
        """A vector, with zeros behind the first `num`."""
        own = self.b.read(place, ir.VectorType(of, num))
        if num == self.vector_inputs:
            return own
        order = [*range(num), *[num] * (self.vector_inputs - num)]
        return self.b.picked(own, ir.Constant(own.type, None), order)

    def _write(self, results: ir.Value, tile: Tile) -> None:
        for r in range(tile.num_rows):
            own = self.b.ordered(results, range(r * tile.num_outputs, (r + 1) * tile.num_outputs))
            self.b.write(own, self.result(self.b.plus(tile.row, r), tile.output))

    def of_outputs(self, place: ir.Value, tile: Tile) -> ir.Value:
        """The outputs' own floats, once for each row of a tile."""
        own = self.b.read(self.b.at(place, tile.output, FLOAT32), ir.VectorType(FLOAT32, tile.num_outputs))
        return self.b.ordered(own, [*range(tile.num_outputs)] * tile.num_rows)

    def of_rows(self, place: ir.Value, of: ir.Type, tile: Tile) -> ir.Value:
        """The rows' own numbers, those of the tile's first at `place`, once for each output."""
        own = self.b.read(place, ir.VectorType(of, tile.num_rows))
        return self.b.ordered(own, [row for row in range(tile.num_rows) for _ in range(tile.num_outputs)])

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
    def scaled(self, totals: ir.Value, tile: Tile) -> ir.Value:
        """The results, row after row."""


TALL: dict[int, Sequence[Together]] = {16: (Together(MANY, 8, 2),), 8: (Together(MOST, 6, 2), Together(MANY, 4, 2))}


class FloatProduct(DotProduct):
    """No scales. Scratch is of `moved_bytes`."""

    lane_inputs = 1
    weight_number = row_number = FLOAT32
    many = TALL
    asked_outputs = 2

    @property
    def sums(self) -> ir.VectorType:
        return self.b.floats

    def prepare_rows(self) -> None:
        """Many that are long are moved apart, so that their blocks fill the first cache evenly: those that begin a power of two
        after each other evict each other."""
        b = self.b
        self._rows, self._row_len = b.variable(self.x), b.variable(self.inputs)
        are_many = b.icmp_signed(">=", self.rows, b.count(MANY))
        with b.if_then(b.and_(are_many, b.icmp_signed(">", self.inputs, b.count(self._block_inputs)))):
            self._rows.set(self.scratch)
            self._row_len.set(b.plus(b.whole(b.plus(self.inputs, ALIKE_FLOATS - 1), ALIKE_FLOATS), self._block_inputs))
            with self.own_share(self.rows) as row:
                numbers, moved = b.at(self.x, b.times(row, self.inputs), FLOAT32), self.row_numbers(row)
                with b.loop(0, self.inputs, FEWEST_LANES) as n:
                    b.write(b.read(b.at(numbers, n, FLOAT32), ir.VectorType(FLOAT32, FEWEST_LANES)), b.at(moved, n, FLOAT32))
            self.wait_for_all()

    def row_numbers(self, row: ir.Value) -> ir.Value:
        return self.b.at(self._rows.get(), self.b.times(row, self._row_len.get()), FLOAT32)

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        return numbers

    def add_product(self, sums: ir.Value, weight: ir.Value, row: ir.Value) -> ir.Value:
        return self.b.fused(weight, row, sums)

    def scaled(self, totals: ir.Value, tile: Tile) -> ir.Value:
        return self.b.fadd(self.of_outputs(self.bias, tile), totals)


class Float16Product(FloatProduct):
    """Weights in float16 become float32 as they are read: half of the memory, and the same numbers."""

    features = HALF_FEATURES
    weight_number = FLOAT16
    asked_outputs = 4

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        return self.b.fpext(numbers, self.b.floats)


class BFloat16Product(FloatProduct):
    """Weights in bfloat16, as in `Float16Product`: they are the first half of a float32."""

    weight_number = HALF_WORD
    asked_outputs = Float16Product.asked_outputs

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        b = self.b
        return b.bitcast(b.shl(b.zext(numbers, b.words), b.all_lanes(b.words, HALF_WORD.width)), b.floats)


class _CodesProduct(DotProduct):
    """Of a weight in eight bits. Scales are float32, one for each output. Scratch is as `RowCodes` says, a group for each row.
    Many rows are turned."""

    weight_number = BYTE
    turned: ClassVar[type[TurnedRows]]

    @property
    def sums(self) -> ir.VectorType:
        return self.b.words

    def prepare_rows(self) -> None:
        self._rows = RowCodes(self, self.inputs, self.row_number)
        self._many = self.turned(self, self._rows)
        self._many.write_factors()
        self._rows.write(self._rows.keep, first_group=self._many.num_rows)
        self._many.write_codes()

    def multiply_many(self, first: ir.Value, last: ir.Value) -> ir.Value:
        self._many.multiply(first, last)
        return self._many.num_rows

    def row_numbers(self, row: ir.Value) -> ir.Value:
        return self._rows.codes(row)

    def scaled(self, totals: ir.Value, tile: Tile) -> ir.Value:
        b, num = self.b, tile.num_rows * tile.num_outputs
        products = b.sitofp(self.exact(totals, tile), ir.VectorType(FLOAT32, num))
        scales = b.fmul(self.of_outputs(self.scales, tile), self.of_rows(self._rows.unit(tile.row), FLOAT32, tile))
        return b.fused(products, scales, self.of_outputs(self.bias, tile))

    @abstractmethod
    def exact(self, totals: ir.Value, tile: Tile) -> ir.Value:
        """The sums of products of codes."""


class Int8Product(_CodesProduct):
    features = BYTE_FEATURES
    lane_inputs = 4
    row_number = BYTE
    turned = ManyRows

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        return self.b.xor(numbers, self.b.all_lanes(self.b.bytes, OFFSET))

    def add_product(self, sums: ir.Value, weight: ir.Value, row: ir.Value) -> ir.Value:
        return self.b.dot_of_bytes(sums, weight, row)

    def exact(self, totals: ir.Value, tile: Tile) -> ir.Value:
        code_sums = self.of_rows(self._rows.code_sum(tile.row), WORD, tile)
        return self.b.sub(totals, self.b.mul(code_sums, self.b.all_lanes(code_sums.type, OFFSET)))


class WidenedInt8Product(_CodesProduct):
    """The same, where bytes are multiplied as numbers of 16 bits: rows are kept so, and a weight becomes so as it is read.
    Behind the scratch of rows are `sums_bytes`."""

    features = WORD_FEATURES
    lane_inputs = 2
    row_number = HALF_WORD
    many = TALL
    turned = WidenedRows

    def as_multiplied(self, numbers: ir.Value) -> ir.Value:
        return self.b.sext(numbers, self.b.pairs)

    def add_product(self, sums: ir.Value, weight: ir.Value, row: ir.Value) -> ir.Value:
        return self.b.dot_of_pairs(sums, weight, row)

    def exact(self, totals: ir.Value, tile: Tile) -> ir.Value:
        return totals
