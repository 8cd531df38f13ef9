"""The instructions that choose each row's experts by a router's scores."""

from __future__ import annotations

import math

from llvmlite import ir

from asyncpipe_workers.compiled.builder import BYTE, COUNT, FLOAT32
from asyncpipe_workers.compiled.rows import RowKernel


class ChooseExperts(RowKernel):
    """Of each row's scores (rows, X), the numbers of the N largest (rows, N), int64, small numbers first, and their shares
    (rows, N): of the softmax over all, or, if they `sum_to_one`, over those. A NaN among the scores makes the shares NaN."""

    def __init__(self, lanes: int, num_experts: int, num_chosen: int, sum_to_one: bool) -> None:
        self._num_experts = num_experts
        self._num_chosen = num_chosen
        self._sum_to_one = sum_to_one
        self._room = -(-num_experts // lanes) * lanes  # whole vectors
        super().__init__(lanes, ("scores", "chosen", "shares"), ("rows",))

    def build_row(self, row: ir.Value) -> None:
        b = self.b
        scores, chosen, shares, _ = self.arguments.values()
        own = b.at(scores, b.times(row, self._num_experts), FLOAT32)
        self._marks = b.room(self._num_experts, BYTE)
        self._weights = b.room(self._room, FLOAT32)
        total = self._weigh(own)
        with b.loop(0, self._num_chosen):
            self._mark_largest(own)
        if self._sum_to_one:
            total = self._sum_of_marked()
        place = b.variable(b.times(row, self._num_chosen))
        with b.loop(0, self._num_experts) as expert, b.if_then(self._is_marked(expert)):
            b.write(expert, b.at(chosen, place.get(), COUNT))
            b.write(b.fdiv(self._weight(expert), total), b.at(shares, place.get(), FLOAT32))
            place.set(b.plus(place.get(), 1))

    def _weigh(self, scores: ir.Value) -> ir.Value:
        """Powers of e, of which the largest is one; returns their sum. Nothing is marked."""
        b = self.b
        lowest = b.all_lanes(b.floats, -math.inf)
        b.write(lowest, b.at(self._weights, self._room - self.lanes, FLOAT32))
        with b.loop(0, self._num_experts) as n:
            b.write(b.read(b.at(scores, n, FLOAT32), FLOAT32), b.at(self._weights, n, FLOAT32))
            b.write(ir.Constant(BYTE, 0), b.at(self._marks, n))
        largest, total = b.variable(lowest), b.variable(b.all_lanes(b.floats, 0.0))
        with b.loop(0, self._room, self.lanes) as n:
            largest.set(b.larger(largest.get(), b.read(b.at(self._weights, n, FLOAT32), b.floats)))
        top = b.spread(b.largest(largest.get()))
        with b.loop(0, self._room, self.lanes) as n:
            place = b.at(self._weights, n, FLOAT32)
            weights = b.exp(b.fsub(b.read(place, b.floats), top))
            total.set(b.fadd(total.get(), weights))
            b.write(weights, place)
        return b.sum(total.get())

    def _mark_largest(self, scores: ir.Value) -> None:
        """Of those that are not marked; there is one, whatever they are."""
        b = self.b
        best, best_score = b.variable(b.count(-1)), b.variable(ir.Constant(FLOAT32, -math.inf))
        with b.loop(0, self._num_experts) as expert:
            score = b.read(b.at(scores, expert, FLOAT32), FLOAT32)
            is_first = b.icmp_signed("<", best.get(), b.count(0))
            is_better = b.or_(is_first, b.fcmp_ordered(">", score, best_score.get()))
            is_new = b.and_(is_better, b.not_(self._is_marked(expert)))
            for variable, value in ((best, expert), (best_score, score)):
                variable.set(b.select(is_new, value, variable.get()))
        b.write(ir.Constant(BYTE, 1), b.at(self._marks, best.get()))

    def _sum_of_marked(self) -> ir.Value:
        b, zero = self.b, ir.Constant(FLOAT32, 0.0)
        total = b.variable(zero)
        with b.loop(0, self._num_experts) as expert:
            total.set(b.fadd(total.get(), b.select(self._is_marked(expert), self._weight(expert), zero)))
        return total.get()

    def _is_marked(self, expert: ir.Value) -> ir.Value:
        return self.b.icmp_signed("!=", self.b.read(self.b.at(self._marks, expert), BYTE), ir.Constant(BYTE, 0))

    def _weight(self, expert: ir.Value) -> ir.Value:
        return self.b.read(self.b.at(self._weights, expert, FLOAT32), FLOAT32)
