"""The instructions that draw a token for each row of logits: `drawing` does the same with torch, and says what a draw is.

A thread goes through a row's weights a few times, in scratch of its own, and makes a list of the likely tokens. Nothing is
sorted: tokens are kept from some weight on, which is found by bisecting the bits of a float, mostly over that list. Of those
that race, few can still win when their turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from asyncpipe_workers.compiled.builder import COUNT, DOUBLE, FLOAT32, MIN_EXPONENT, WORD, Count, Variable
from asyncpipe_workers.compiled.kernel import Kernel
from asyncpipe_workers.drawing import GOLDEN, LAST_SHIFT, MIXING

LISTS = 3  # of scratch: weights of all tokens; those of likely ones, and their ids
LEAST_TEMPERATURE = 1e-30  # one over it is a float32
CONDITION = ir.IntType(1)
ZERO, INFINITE = (ir.Constant(FLOAT32, number) for number in (0.0, math.inf))
ONE_BITS = 0x3F800000  # of 1.0, which the likeliest token weighs


def scratch_bytes(size: int, lanes: int, num_threads: int) -> int:
    return num_threads * LISTS * _room(size, lanes) * 4


def _room(size: int, lanes: int) -> int:
    """Of a list: whole vectors, and zeros behind it."""
    return (-(-size // lanes) + 1) * lanes


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Weights of so many, and zeros up to a whole vector."""

    weights: ir.Value
    num: ir.Value
    are_all: ir.Value  # in the order of their ids, or a list


@dataclass(frozen=True, slots=True)
class _Kept:
    """Tokens that weigh more than `weight`, the first `num_equal` of those that weigh as much, and none that weighs `below` or
    more."""

    weight: Variable
    num_equal: Variable
    below: Variable


class DrawRows(Kernel):
    """logits (R, V) in float32, whose rows are `stride` numbers apart; `numbers` (R, 4), float64: a row's temperature, uniform,
    top_p and min_p; `wholes` (R, 2), int64: its top_k and key; `drawn` (R,), int64. Scratch has room for `scratch_bytes`."""

    def __init__(self, lanes: int, likely_above: float) -> None:
        self._likely_weight = ir.Constant(FLOAT32, math.exp(likely_above))
        super().__init__(lanes, ("logits", "numbers", "wholes", "drawn", "scratch"), ("rows", "size", "stride"))

    def build(self) -> None:
        b = self.b
        logits, numbers, wholes, drawn, scratch, rows, self._size, stride = self.arguments.values()
        room = b.plus(b.whole(b.plus(self._size, self.lanes - 1), self.lanes), self.lanes)
        first = b.times(self.thread(), LISTS)
        lists = (b.at(scratch, b.times(b.plus(first, n), room), WORD) for n in range(LISTS))
        self._weights, self._likely_weights, self._likely_ids = lists
        with self.shared(rows) as row:
            temperature, uniform, top_p, min_p = (
                b.read(b.at(numbers, b.plus(b.times(row, 4), n), DOUBLE), DOUBLE) for n in range(4)
            )
            top_k, key = (b.read(b.at(wholes, b.plus(b.times(row, 2), n), COUNT), COUNT) for n in range(2))
            self._weigh(b.at(logits, b.times(row, stride), FLOAT32), temperature)
            kept = _Kept(b.variable(ZERO), b.variable(b.count(0)), b.variable(INFINITE))
            are_all = b.variable(ir.Constant(CONDITION, 1))
            with b.if_else(self._is_limited(top_k, top_p, min_p)) as (limited, unlimited):
                with limited:
                    self._limit(kept, top_k, top_p, min_p)
                    are_all.set(b.fcmp_ordered("<", kept.weight.get(), self._likely_weight))
                with unlimited:
                    is_likely = b.fcmp_ordered("<", b.fmul(uniform, b.fadd(self._likely, self._others)), self._likely)
                    kept.below.set(b.select(is_likely, INFINITE, self._likely_weight))
                    are_all.set(b.not_(is_likely))
            b.write(self._first(self._tokens(are_all.get()), kept, key), b.at(drawn, row, COUNT))

    def _tokens(self, are_all: ir.Value) -> _Tokens:
        b = self.b
        weights = b.select(are_all, self._weights, self._likely_weights)
        return _Tokens(weights, b.select(are_all, self._size, self._num_likely), are_all)

    # --- weights ---

    def _weigh(self, logits: ir.Value, temperature: ir.Value) -> None:
        """The likeliest token's weight is one. A NaN weighs nothing."""
        b = self.b
        top = b.spread(self._copy(logits))
        least = ir.Constant(DOUBLE, LEAST_TEMPERATURE)
        temperature = b.select(b.fcmp_ordered("<", temperature, least), least, temperature)
        factor = b.spread(b.fptrunc(b.fdiv(ir.Constant(DOUBLE, 1.0), temperature), FLOAT32))
        zero, lowest, likely = (b.all_lanes(b.floats, number) for number in (0.0, MIN_EXPONENT, self._likely_weight.constant))
        sums = [b.variable(b.all_lanes(b.doubles, 0.0)) for _ in range(2)]
        num = b.variable(b.count(0))
        with b.loop(0, self._size, self.lanes) as n:
            place = b.at(self._weights, n, FLOAT32)
            scaled = b.fmul(b.fsub(b.read(place, b.floats), top), factor)
            weights = b.select(b.fcmp_ordered(">=", scaled, lowest), b.exp(scaled), zero)
            b.write(weights, place)
            are_likely = b.fcmp_ordered(">=", weights, likely)
            for total, own in zip(
                sums, (b.select(are_likely, weights, zero), b.select(are_likely, zero, weights)), strict=True
            ):
                total.set(b.fadd(total.get(), b.fpext(own, b.doubles)))
            with b.if_then(self._is_any(are_likely)), b.loop(n, b.plus(n, self.lanes)) as token:
                self._push(num, token)
        b.write(zero, b.at(self._likely_weights, num.get(), FLOAT32))
        self._likely, self._others = (b.sum(total.get()) for total in sums)
        self._num_likely = num.get()

    def _copy(self, logits: ir.Value) -> ir.Value:
        """To where weights will be; returns the largest."""
        b = self.b
        lowest = b.all_lanes(b.floats, -math.inf)
        top, whole = b.variable(lowest), b.whole(self._size, self.lanes)
        last = b.at(self._weights, b.whole(b.plus(self._size, -1), self.lanes), FLOAT32)
        b.write(lowest, last)
        with b.loop(0, whole, self.lanes) as n:
            numbers = b.read(b.at(logits, n, FLOAT32), b.floats)
            b.write(numbers, b.at(self._weights, n, FLOAT32))
            top.set(b.larger_number(numbers, top.get()))
        with b.loop(whole, self._size) as n:
            b.write(b.read(b.at(logits, n, FLOAT32), FLOAT32), b.at(self._weights, n, FLOAT32))
        return b.largest(b.larger_number(b.read(last, b.floats), top.get()))

    def _push(self, num: Variable, token: ir.Value) -> None:
        """To the list, if it is likely."""
        b = self.b
        weight = b.read(b.at(self._weights, token, FLOAT32), FLOAT32)
        b.write(weight, b.at(self._likely_weights, num.get(), FLOAT32))
        b.write(b.trunc(token, WORD), b.at(self._likely_ids, num.get(), WORD))
        num.set(b.plus(num.get(), b.zext(b.fcmp_ordered(">=", weight, self._likely_weight), COUNT)))

    def _is_any(self, are: ir.Value) -> ir.Value:
        mask = ir.IntType(self.lanes)
        return self.b.icmp_unsigned("!=", self.b.bitcast(are, mask), ir.Constant(mask, 0))

    # --- limits ---

    def _is_limited(self, top_k: ir.Value, top_p: ir.Value, min_p: ir.Value) -> ir.Value:
        b = self.b
        is_p_limited = b.or_(
            b.fcmp_ordered("<", top_p, ir.Constant(DOUBLE, 1.0)), b.fcmp_ordered(">", min_p, ir.Constant(DOUBLE, 0.0))
        )
        return b.or_(is_p_limited, b.icmp_signed(">", top_k, b.count(0)))

    def _limit(self, kept: _Kept, top_k: ir.Value, top_p: ir.Value, min_p: ir.Value) -> None:
        b = self.b
        total = b.variable(b.fadd(self._likely, self._others))
        with b.if_then(b.icmp_signed(">", top_k, b.count(0))):
            tokens = self._tokens(b.icmp_signed("<", self._num_likely, top_k))
            weight = self._least(lambda weight: b.icmp_signed("<", self._num_above(tokens, weight), top_k))
            num_equal = b.sub(top_k, self._num_above(tokens, weight))
            equal = b.fmul(b.sitofp(num_equal, DOUBLE), b.fpext(weight, DOUBLE))
            total.set(b.fadd(self._sum_above(tokens, weight), equal))
            kept.weight.set(weight)
            kept.num_equal.set(num_equal)
        with b.if_then(b.fcmp_ordered("<", top_p, ir.Constant(DOUBLE, 1.0))):
            self._limit_sum(kept, b.fmul(top_p, total.get()))
        least = b.fptrunc(min_p, FLOAT32)
        with b.if_then(b.fcmp_ordered(">", least, kept.weight.get())):
            kept.weight.set(least)
            kept.num_equal.set(self._size)

    def _limit_sum(self, kept: _Kept, most: ir.Value) -> None:
        """A token is kept if those before it weigh less than `most`."""
        b = self.b
        tokens = self._tokens(b.fcmp_ordered("<", self._likely, most))
        weight = self._least(lambda weight: b.fcmp_ordered("<", self._sum_above(tokens, weight), most))
        left, all_of_them = b.fsub(most, self._sum_above(tokens, weight)), b.sitofp(self._size, DOUBLE)
        num_equal = b.outside("llvm.ceil.f64", DOUBLE, b.fdiv(left, b.fpext(weight, DOUBLE)))
        num_equal = b.fptosi(b.select(b.fcmp_ordered("<", num_equal, all_of_them), num_equal, all_of_them), COUNT)
        with b.if_then(b.fcmp_ordered("==", weight, kept.weight.get())):
            kept.num_equal.set(b.at_most(kept.num_equal.get(), num_equal))
        with b.if_then(b.fcmp_ordered(">", weight, kept.weight.get())):
            kept.weight.set(weight)
            kept.num_equal.set(num_equal)

    def _least(self, holds: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """The least weight for which it holds; it does for all greater ones."""
        b = self.b
        low, high = b.variable(b.count(-1)), b.variable(b.count(ONE_BITS))
        with b.endless_loop() as leave:
            leave(b.icmp_signed("<=", b.sub(high.get(), low.get()), b.count(1)))
            middle = b.ashr(b.plus(low.get(), high.get()), b.count(1))
            found = holds(self._as_weight(middle))
            low.set(b.select(found, low.get(), middle))
            high.set(b.select(found, middle, high.get()))
        return self._as_weight(high.get())

    def _as_weight(self, bits: ir.Value) -> ir.Value:
        return self.b.bitcast(self.b.trunc(bits, WORD), FLOAT32)

    def _num_above(self, tokens: _Tokens, weight: ir.Value) -> ir.Value:
        b = self.b
        nums, bound = b.variable(b.all_lanes(b.words, 0)), b.spread(weight)
        with b.loop(0, tokens.num, self.lanes) as n:
            are_above = b.fcmp_ordered(">", b.read(b.at(tokens.weights, n, FLOAT32), b.floats), bound)
            nums.set(b.add(nums.get(), b.zext(are_above, b.words)))
        return b.zext(b.sum(nums.get()), COUNT)

    def _sum_above(self, tokens: _Tokens, weight: ir.Value) -> ir.Value:
        b = self.b
        total, bound = b.variable(b.all_lanes(b.doubles, 0.0)), b.spread(weight)
        with b.loop(0, tokens.num, self.lanes) as n:
            weights = b.read(b.at(tokens.weights, n, FLOAT32), b.floats)
            above = b.select(b.fcmp_ordered(">", weights, bound), weights, b.all_lanes(b.floats, 0.0))
            total.set(b.fadd(total.get(), b.fpext(above, b.doubles)))
        return b.sum(total.get())

    # --- the race ---

    def _first(self, tokens: _Tokens, kept: _Kept, key: ir.Value) -> ir.Value:
        """The id of the token that wins; 0 if none races."""
        b = self.b
        winner, best = b.variable(b.count(0)), b.variable(ir.Constant(DOUBLE, math.inf))
        least, below, num_equal = kept.weight.get(), kept.below.get(), b.variable(kept.num_equal.get())
        with b.loop(0, tokens.num) as n:
            weight = b.read(b.at(tokens.weights, n, FLOAT32), FLOAT32)
            is_equal = b.and_(b.fcmp_ordered("==", weight, least), b.icmp_signed(">", num_equal.get(), b.count(0)))
            num_equal.set(b.sub(num_equal.get(), b.zext(is_equal, COUNT)))
            races = b.and_(b.or_(b.fcmp_ordered(">", weight, least), is_equal), b.fcmp_ordered("<", weight, below))
            with b.if_then(races):
                token = b.select(tokens.are_all, n, b.zext(b.read(b.at(self._likely_ids, n, WORD), WORD), COUNT))
                uniform, weight = self._uniform(key, token), b.fpext(weight, DOUBLE)
                # -log(u) is never less than 1 - u.
                at_least = b.fsub(ir.Constant(DOUBLE, 1.0), uniform)
                with b.if_then(b.fcmp_ordered("<", at_least, b.fmul(best.get(), weight))):
                    time = b.fdiv(b.fneg(b.outside("llvm.log.f64", DOUBLE, uniform)), weight)
                    is_first = b.fcmp_ordered("<", time, best.get())
                    winner.set(b.select(is_first, token, winner.get()))
                    best.set(b.select(is_first, time, best.get()))
        return winner.get()

    def _uniform(self, key: ir.Value, token: Count) -> ir.Value:
        """As `drawing.uniforms_of` has it."""
        b = self.b
        state = b.plus(b.times(token, GOLDEN), key)
        for shift, factor in MIXING:
            state = b.times(b.xor(state, b.lshr(state, b.count(shift))), factor)
        state = b.lshr(b.xor(state, b.lshr(state, b.count(LAST_SHIFT))), b.count(11))
        return b.fmul(b.fadd(b.uitofp(state, DOUBLE), ir.Constant(DOUBLE, 0.5)), ir.Constant(DOUBLE, 2.0**-53))
