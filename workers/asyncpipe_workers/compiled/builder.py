"""LLVM's instructions in the terms of kernels: counts, addresses, vectors of one register, loops and variables.

What is built at once, in Python's loops, is unrolled; `loop` is a loop of the kernel's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from llvmlite import binding as llvm
from llvmlite import ir

BYTE, HALF_WORD, WORD, COUNT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT16, FLOAT32, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
ADDRESS = ir.PointerType()
NOTHING = ir.VoidType()

READ, DATA = 0, 1  # llvm.prefetch's arguments, and where to:
PASSING_BY, TO_SECOND_CACHE, TO_FIRST_CACHE = 0, 2, 3

LOG2_E = 1.4426950408889634
LN_2 = (0.693359375, -2.12194440e-4)  # as two numbers, for one would lose the last bits
EXP_SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0)
MIN_EXPONENT, MAX_EXPONENT = -87.0, 88.0
ERF_FACTOR, ERF_SERIES = 0.3275911, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
EXPONENT_BIAS, MANTISSA_BITS = 127, 23
WIDEST_LANES = 16
LINE_BYTES = 64  # of a cache

Count: TypeAlias = ir.Value | int


class Builder(ir.IRBuilder):  # type: ignore[misc]
    """Of a function whose vectors have `lanes` 32-bit lanes; `multiplies_bytes`: the processor has an instruction for that
    (VNNI)."""

    def __init__(self, block: ir.Block, lanes: int, *, multiplies_bytes: bool = True) -> None:
        super().__init__(block)
        self.lanes = lanes
        self._multiplies_bytes = multiplies_bytes
        self.floats = ir.VectorType(FLOAT32, lanes)
        self.doubles = ir.VectorType(DOUBLE, lanes)
        self.words = ir.VectorType(WORD, lanes)
        self.bytes = ir.VectorType(BYTE, 4 * lanes)
        self.pairs = ir.VectorType(HALF_WORD, 2 * lanes)

    # --- counts and addresses ---

    def count(self, n: Count) -> ir.Value:
        return ir.Constant(COUNT, n) if isinstance(n, int) else n

    def plus(self, *counts: Count) -> ir.Value:
        first, *others = map(self.count, counts)
        for other in others:
            first = self.add(first, other)
        return first

    def times(self, *counts: Count) -> ir.Value:
        first, *others = map(self.count, counts)
        for other in others:
            first = self.mul(first, other)
        return first

    def over(self, n: Count, divisor: Count) -> ir.Value:
        return self.udiv(self.count(n), self.count(divisor))

    def whole(self, n: Count, multiple: Count) -> ir.Value:
        """The largest multiple that is no more than `n`."""
        return self.times(self.over(n, multiple), multiple)

    def at_most(self, n: ir.Value, bound: Count) -> ir.Value:
        return self.select(self.icmp_signed("<", n, self.count(bound)), n, self.count(bound))

    def at_least(self, n: ir.Value, bound: Count) -> ir.Value:
        return self.select(self.icmp_signed(">", n, self.count(bound)), n, self.count(bound))

    def at(self, address: ir.Value, offset: Count, of: ir.Type = BYTE) -> ir.Value:
        """The address of number `offset` of those from `address` on."""
        return self.gep(address, [self.count(offset)], source_etype=of)

    def read(self, address: ir.Value, of: ir.Type) -> ir.Value:
        """However it is aligned."""
        return self.load(address, typ=of, align=1)

    def write(self, value: ir.Value, address: ir.Value) -> None:
        self.store(value, address, align=1)

    def room(self, num: int, of: ir.Type) -> ir.Value:
        """The address of room for so many numbers, each thread's own."""
        with self.goto_entry_block():
            place = self.ptrtoint(self.alloca(of, num), COUNT)  # llvmlite would go on to know what it points to
            return self.inttoptr(place, ADDRESS)

    def kept(self, address: ir.Value) -> ir.Value:
        """The same, of which LLVM does not know how it came about: a loop keeps it in a register, and does not compute it."""
        return self.asm(ir.FunctionType(ADDRESS, [ADDRESS]), "", "=r,0", [address], side_effect=False)

    def prefetch(self, address: ir.Value) -> None:
        """Of what is read once."""
        self._prefetch(address, _place_of_what_is_read_once())

    def prefetch_to_keep(self, address: ir.Value) -> None:
        """Of what is read soon, and again later."""
        self._prefetch(address, TO_FIRST_CACHE)

    def _prefetch(self, address: ir.Value, place: int) -> None:
        self.outside("llvm.prefetch.p0", NOTHING, address, *(ir.Constant(WORD, n) for n in (READ, place, DATA)))

    def read_floats(self, address: ir.Value, of: ir.Type) -> ir.Value:
        """As many numbers as there are lanes, of that type."""
        numbers = self.read(address, ir.VectorType(of, self.lanes))
        return numbers if of == FLOAT32 else self.fpext(numbers, self.floats)

    def write_floats(self, numbers: ir.Value, address: ir.Value, of: ir.Type) -> None:
        """As numbers of that type, rounded."""
        self.write(numbers if of == FLOAT32 else self.fptrunc(numbers, ir.VectorType(of, self.lanes)), address)

    # --- vectors ---

    def all_lanes(self, of: ir.VectorType, value: float) -> ir.Constant:
        return ir.Constant(of, [value] * of.count)

    def spread(self, value: ir.Value) -> ir.Value:
        """A 32-bit number in every lane."""
        vector = ir.VectorType(value.type, self.lanes)
        first = self.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(WORD, 0))
        return self.ordered(first, [0] * self.lanes)

    def ordered(self, vector: ir.Value, order: Sequence[int]) -> ir.Value:
        """Lane i is the vector's lane `order[i]`."""
        return self.picked(vector, ir.Constant(vector.type, ir.Undefined), order)

    def picked(self, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
        """As `ordered`, of the lanes of both; those of `b` come after those of `a`."""
        return self.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, len(order)), list(order)))

    def fused(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once."""
        return self.outside(f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def magnitudes(self, x: ir.Value) -> ir.Value:
        return self.outside(f"llvm.fabs.v{self.lanes}f32", self.floats, x)

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Lane by lane; of a NaN and a number, the NaN."""
        return self.outside(f"llvm.maximum.v{self.lanes}f32", self.floats, a, b)

    def larger_number(self, x: ir.Value, number: ir.Value) -> ir.Value:
        """Lane by lane; of a NaN and a number, the number."""
        return self.select(self.fcmp_ordered(">", x, number), x, number)

    def largest(self, x: ir.Value) -> ir.Value:
        """Of all lanes."""
        return self.outside(f"llvm.vector.reduce.fmaximum.v{self.lanes}f32", FLOAT32, x)

    def nearest(self, x: ir.Value) -> ir.Value:
        """Integers, halves to even ones."""
        return self.fptosi(self.outside(f"llvm.rint.v{self.lanes}f32", self.floats, x), self.words)

    def sum(self, x: ir.Value) -> ir.Value:
        """Of all lanes."""
        if x.type == self.words:
            return self.outside(f"llvm.vector.reduce.add.v{self.lanes}i32", WORD, x)
        of, bits = (FLOAT32, 32) if x.type == self.floats else (DOUBLE, 64)
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f{bits}"
        if name not in self.module.globals:
            ir.Function(self.module, ir.FunctionType(of, [of, x.type]), name)
        return self.call(self.module.globals[name], [ir.Constant(of, 0.0), x], fastmath=["reassoc"])

    def sums(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Of all lanes of each: a vector of as many numbers. They are a power of two of at most `lanes`."""
        add = self.add if vectors[0].type == self.words else self.fadd
        part = self.lanes  # lanes of one vector that are left
        while part > 1:
            pairs = [*zip(vectors[::2], vectors[1::2], strict=True)] if len(vectors) > 1 else [(vectors[0],) * 2]
            num = (2 if len(vectors) > 1 else 1) * (vectors[0].type.count // part)
            part //= 2
            first = [2 * part * n + lane for n in range(num) for lane in range(part)]
            second = [lane + part for lane in first]
            vectors = [add(*(self.picked(*pair, half) for half in (first, second))) for pair in pairs]
        return vectors[0]

    def smaller_or(self, x: ir.Value, bound: float) -> ir.Value:
        """At most `bound`; a NaN stays."""
        limit = self.all_lanes(self.floats, bound)
        return self.select(self.fcmp_ordered(">", x, limit), limit, x)

    def exp(self, x: ir.Value) -> ir.Value:
        """To about a bit, between the exponents of float32, and never zero. As Cephes has it (Moshier 1989): 2^n e^r."""
        floor = self.all_lanes(self.floats, MIN_EXPONENT)
        x = self.smaller_or(self.select(self.fcmp_ordered("<", x, floor), floor, x), MAX_EXPONENT)
        whole = self.outside(f"llvm.rint.v{self.lanes}f32", self.floats, self.fmul(x, self.all_lanes(self.floats, LOG2_E)))
        for part in LN_2:
            x = self.fused(whole, self.all_lanes(self.floats, -part), x)
        series = self.all_lanes(self.floats, EXP_SERIES[0])
        for factor in EXP_SERIES[1:]:
            series = self.fused(series, x, self.all_lanes(self.floats, factor))
        exponent = self.add(self.fptosi(whole, self.words), self.all_lanes(self.words, EXPONENT_BIAS))
        return self.fmul(series, self.bitcast(self.shl(exponent, self.all_lanes(self.words, MANTISSA_BITS)), self.floats))

    def tanh(self, x: ir.Value) -> ir.Value:
        one, two = (self.all_lanes(self.floats, n) for n in (1.0, 2.0))
        return self.fsub(one, self.fdiv(two, self.fadd(self.exp(self.fmul(x, two)), one)))

    def erf(self, x: ir.Value) -> ir.Value:
        """To 2e-7. As Abramowitz and Stegun have it (7.1.26): 1 - t (a + b t + ...) e^(-x^2), with t = 1 / (1 + p |x|)."""
        one, size = self.all_lanes(self.floats, 1.0), self.magnitudes(x)
        t = self.fdiv(one, self.fused(size, self.all_lanes(self.floats, ERF_FACTOR), one))
        series = self.all_lanes(self.floats, 0.0)
        for factor in ERF_SERIES:
            series = self.fused(series, t, self.all_lanes(self.floats, factor))
        rest = self.fmul(self.fmul(series, t), self.exp(self.fneg(self.fmul(x, x))))
        result = self.fsub(one, rest)
        return self.select(self.fcmp_ordered("<", x, self.all_lanes(self.floats, 0.0)), self.fneg(result), result)

    def dot_of_bytes(self, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Each lane of `sums`, plus its four bytes of one times its four bytes of the other."""
        if self._multiplies_bytes:
            return self.outside(f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", self.words, sums, unsigned, signed)
        for own, other in zip(self._halves(unsigned, self.lshr), self._halves(signed, self.ashr), strict=True):
            sums = self.dot_of_pairs(sums, own, other)
        return sums

    def dot_of_pairs(self, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Each lane of `sums`, plus its two numbers of 16 bits of one times its two of the other."""
        multiply = "llvm.x86.avx512.pmaddw.d.512" if self.lanes == WIDEST_LANES else "llvm.x86.avx2.pmadd.wd"
        return self.add(sums, self.outside(multiply, self.words, a, b))

    def _halves(self, numbers: ir.Value, shift: Callable[[ir.Value, ir.Value], ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Bytes as numbers of 16 bits: those of even places and those of odd ones."""
        both, by = self.bitcast(numbers, self.pairs), self.all_lanes(self.pairs, BYTE.width)
        return shift(self.shl(both, by), by), shift(both, by)

    # --- control ---

    def outside(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        """A call of one of LLVM's functions, or the process's."""
        if name not in self.module.globals:
            ir.Function(self.module, ir.FunctionType(result, [arg.type for arg in args]), name)
        return self.call(self.module.globals[name], args)

    def variable(self, value: ir.Value) -> Variable:
        with self.goto_entry_block():
            place = self.alloca(value.type)
        variable = Variable(self, place, value.type)
        variable.set(value)
        return variable

    @contextmanager
    def loop(self, start: Count, stop: Count, step: int = 1) -> Iterator[ir.Value]:
        """From `start` as long as it is below `stop`."""
        head, body, after = (self.append_basic_block() for _ in range(3))
        before = self.block
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(COUNT)
        index.add_incoming(self.count(start), before)
        self.cbranch(self.icmp_signed("<", index, self.count(stop)), body, after)
        self.position_at_end(body)
        yield index
        index.add_incoming(self.plus(index, step), self.block)
        self.branch(head)
        self.position_at_end(after)

    @contextmanager
    def endless_loop(self) -> Iterator[Callable[[ir.Value], None]]:
        """Until what it gives is called with a condition that holds."""
        body, after = (self.append_basic_block() for _ in range(2))

        def leave(condition: ir.Value) -> None:
            go_on = self.append_basic_block()
            self.cbranch(condition, after, go_on)
            self.position_at_end(go_on)

        self.branch(body)
        self.position_at_end(body)
        yield leave
        self.branch(body)
        self.position_at_end(after)


class Variable:
    """What changes in loops. LLVM keeps it in a register."""

    def __init__(self, builder: Builder, place: ir.Value, of: ir.Type) -> None:
        self._builder = builder
        self._place = place
        self._type = of

    def get(self) -> ir.Value:
        return self._builder.load(self._place, typ=self._type)

    def set(self, value: ir.Value) -> None:
        self._builder.store(value, self._place)


@functools.cache
def _place_of_what_is_read_once() -> int:
    """AMD's Zen lets it pass by the second and third cache, where all other data stays. Of others we have not measured it."""
    return PASSING_BY if llvm.get_host_cpu_name().startswith("znver") else TO_SECOND_CACHE
