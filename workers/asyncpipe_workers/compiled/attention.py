"""The instructions of attention of sequences' newest tokens, over keys and values that are each read once where they lie.

A product of many keys with one query is what libraries for matrices are worst at: on some processors it reads memory at half
of its rate, and writing the new keys to where they belong takes as long again. Here a thread has some of the heads of keys and
values of some of the sequences; it writes their new token, and computes the heads that share them a few at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from llvmlite import ir

from asyncpipe_workers.compiled.builder import COUNT, FLOAT16, FLOAT32
from asyncpipe_workers.compiled.kernel import HALF_FEATURES, Kernel

ADDRESSES = ("q", "k", "v", "keys", "values", "sequences", "out", "scratch")
COUNTS = ("rows", "groups", "capacity", "q_stride", "k_stride", "v_stride", "longest")
"""q (B, H, K), k and v (B, G, K), whose rows are so many numbers apart; keys and values (S, G, C, K); out (B, H, K). Keys and
values are of the type that is kept, everything else is float32.

`sequences` (B, 3) are int64: the slot, the first token that is seen, and the length with the new token. `longest` is what is
seen at most; scratch has room for `scratch_bytes`.
"""

MAX_SUMS = 16  # vectors
SPARE_VECTORS = 2  # behind a head's scores: the last vector may begin with the last score, and another follows it


def heads_at_once(size: int, lanes: int) -> int:
    """Whose sums stay in registers."""
    return max(MAX_SUMS * lanes // size, 1)


def scratch_bytes(longest: int, size: int, lanes: int, num_threads: int) -> int:
    return num_threads * heads_at_once(size, lanes) * (longest + SPARE_VECTORS * lanes) * 4


class RowAttention(Kernel):
    """For `shared` heads of `size` to each one of keys and values. Raises NotImplementedError for a size that is no multiple of
    `lanes`."""

    kept: ClassVar[ir.Type] = FLOAT32

    def __init__(self, lanes: int, shared: int, size: int, softcap: float | None = None) -> None:
        if size % lanes:
            raise NotImplementedError(f"no attention of newest tokens for heads of {size}")
        self._shared = shared
        self._size = size
        self._softcap = softcap
        super().__init__(lanes, ADDRESSES, COUNTS)

    def build(self) -> None:
        b = self.b
        rows, groups, capacity, q_stride, k_stride, v_stride, longest = (self.arguments[name] for name in COUNTS)
        q, k, v, keys, values, sequences, out, scratch = (self.arguments[name] for name in ADDRESSES)
        at_once = heads_at_once(self._size, self.lanes)
        head_scores = b.plus(longest, SPARE_VECTORS * self.lanes)
        scratch = b.at(scratch, b.times(self.thread(), at_once, head_scores), FLOAT32)
        with self.shared(b.times(rows, groups)) as n:
            row, group = b.over(n, groups), b.urem(n, groups)
            slot, first, length = (b.read(b.at(sequences, b.plus(b.times(row, 3), i), COUNT), COUNT) for i in range(3))
            begin = b.times(b.plus(b.times(slot, groups), group), capacity)
            kept = []
            for new, stride, cache in ((k, k_stride, keys), (v, v_stride, values)):
                own = b.at(cache, b.times(begin, self._size), self.kept)
                token = b.at(new, b.plus(b.times(row, stride), b.times(group, self._size)), FLOAT32)
                self._keep(token, b.at(own, b.times(b.sub(length, b.count(1)), self._size), self.kept))
                kept.append(b.at(own, b.times(first, self._size), self.kept))
            seen = b.sub(length, first)
            for head in range(0, self._shared, at_once):
                heads = range(head, min(head + at_once, self._shared))
                own_heads = [b.plus(b.times(group, self._shared), head) for head in heads]
                queries = [b.at(q, b.plus(b.times(row, q_stride), b.times(head, self._size)), FLOAT32) for head in own_heads]
                places = [b.plus(b.times(row, groups, self._shared), head) for head in own_heads]
                outs = [b.at(out, b.times(place, self._size), FLOAT32) for place in places]
                scores = [b.at(scratch, b.times(i, head_scores), FLOAT32) for i in range(len(heads))]
                self._score(queries, kept[0], seen, scores)
                sums = [self._weigh(own, seen) for own in scores]
                self._mix(scores, sums, kept[1], seen, outs)

    def _keep(self, token: ir.Value, to: ir.Value) -> None:
        b = self.b
        for n in range(0, self._size, self.lanes):
            b.write_floats(b.read(b.at(token, n, FLOAT32), b.floats), b.at(to, n, self.kept), self.kept)

    def _score(self, queries: Sequence[ir.Value], keys: ir.Value, seen: ir.Value, scores: Sequence[ir.Value]) -> None:
        b = self.b
        with b.loop(0, seen) as token:
            key = b.at(keys, b.times(token, self._size), self.kept)
            sums = [b.all_lanes(b.floats, 0.0)] * len(queries)
            for n in range(0, self._size, self.lanes):
                part = b.read_floats(b.at(key, n, self.kept), self.kept)
                sums = [
                    b.fused(part, b.read(b.at(query, n, FLOAT32), b.floats), total)
                    for query, total in zip(queries, sums, strict=True)
                ]
            for own, total in zip(scores, sums, strict=True):
                b.write(b.sum(total), b.at(own, token, FLOAT32))

    def _weigh(self, scores: ir.Value, seen: ir.Value) -> ir.Value:
        """Scores become weights that are yet to be divided by their sum, which is returned."""
        b = self.b
        scale = 1 / math.sqrt(self._size)
        if self._softcap is not None:
            with b.loop(0, seen, self.lanes) as n:
                place = b.at(scores, n, FLOAT32)
                within = b.fmul(b.read(place, b.floats), b.all_lanes(b.floats, scale / self._softcap))
                b.write(b.fmul(b.tanh(within), b.all_lanes(b.floats, self._softcap)), place)
            scale = 1.0
        b.write(b.all_lanes(b.floats, -math.inf), b.at(scores, seen, FLOAT32))
        largest = b.variable(b.all_lanes(b.floats, -math.inf))
        with b.loop(0, seen, self.lanes) as n:
            largest.set(b.larger(largest.get(), b.read(b.at(scores, n, FLOAT32), b.floats)))
        top = b.spread(b.largest(largest.get()))
        total = b.variable(b.all_lanes(b.floats, 0.0))
        with b.loop(0, seen, self.lanes) as n:
            place = b.at(scores, n, FLOAT32)
            below = b.fsub(b.read(place, b.floats), top)
            weights = b.exp(b.fmul(below, b.all_lanes(b.floats, scale)))
            total.set(b.fadd(total.get(), weights))
            b.write(weights, place)
        return b.sum(total.get())

    def _mix(
        self, weights: Sequence[ir.Value], sums: Sequence[ir.Value], values: ir.Value, seen: ir.Value, outs: Sequence[ir.Value]
    ) -> None:
        b = self.b
        parts = range(0, self._size, self.lanes)
        mixed = {(i, n): b.variable(b.all_lanes(b.floats, 0.0)) for i in range(len(outs)) for n in parts}
        with b.loop(0, seen) as token:
            value = b.at(values, b.times(token, self._size), self.kept)
            each = [b.spread(b.read(b.at(own, token, FLOAT32), FLOAT32)) for own in weights]
            for n in parts:
                part = b.read_floats(b.at(value, n, self.kept), self.kept)
                for i, weight in enumerate(each):
                    mixed[i, n].set(b.fused(part, weight, mixed[i, n].get()))
        for i, (total, out) in enumerate(zip(sums, outs, strict=True)):
            factor = b.spread(b.fdiv(ir.Constant(FLOAT32, 1.0), total))
            for n in parts:
                b.write(b.fmul(mixed[i, n].get(), factor), b.at(out, n, FLOAT32))


class RowAttention16(RowAttention):
    """Over keys and values in float16."""

    features = HALF_FEATURES
    kept = FLOAT16
