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

from asyncpipe_workers.compiled.builder import COUNT, FLOAT16, FLOAT32, Count
from asyncpipe_workers.compiled.kernel import HALF_FEATURES, Kernel

ADDRESSES = ("q", "k", "v", "keys", "values", "sequences", "out", "scratch")
COUNTS = ("rows", "groups", "capacity", "q_stride", "k_stride", "v_stride", "longest")
"""q (B, H, K), k and v (B, G, K), whose rows are so many numbers apart; keys and values (S, G, C, K); out (B, H, K). Keys and
values are of the type that is kept, everything else is float32.

`sequences` (B, 3) are int64: the slot, the first token that is seen, and the length with the new token. `longest` is what is
seen at most; scratch has room for `scratch_bytes`.
"""

MAX_SUMS = 16  # vectors
MAX_TOKENS = 4  # whose scores are computed at once
LINE_BYTES = 64  # of a cache
ASKED_BYTES = 4096  # ahead
SPARE_VECTORS = 2  # behind a head's scores: the last vector may begin with the last score, and another follows it


def heads_at_once(size: int, lanes: int) -> int:
    """Whose sums stay in registers."""
    return min(max(MAX_SUMS * lanes // size, 1), lanes)


def power_of_two(num: int) -> int:
    """The smallest that is no less than `num`."""
    return 1 << (num - 1).bit_length()


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
                self._score(queries, kept[0], kept[1], seen, scores)
                sums = self._weigh(scores, seen)
                self._mix(scores, sums, kept[1], seen, outs)

    def _keep(self, token: ir.Value, to: ir.Value) -> None:
        b = self.b
        for n in range(0, self._size, self.lanes):
            b.write_floats(b.read(b.at(token, n, FLOAT32), b.floats), b.at(to, n, self.kept), self.kept)

    def _score(
        self, queries: Sequence[ir.Value], keys: ir.Value, values: ir.Value, seen: ir.Value, scores: Sequence[ir.Value]
    ) -> None:
        """Of some tokens at a time. Values are asked for when there are no more keys to ask for."""
        b = self.b
        num = min(self.lanes // power_of_two(len(queries)), MAX_TOKENS)
        num_ahead = ASKED_BYTES // self._token_bytes
        whole = b.whole(seen, num)
        for first, last, together in ((b.count(0), whole, num), (whole, seen, 1)):
            with b.loop(first, last, together) as token:
                ahead = b.plus(token, num_ahead)
                asked = b.select(
                    b.icmp_signed("<", ahead, seen), self._token(keys, ahead), self._token(values, b.sub(ahead, seen))
                )
                found = self._scores_of(queries, self._token(keys, token), asked, together)
                for n, own in enumerate(scores):
                    b.write(b.ordered(found, range(n * together, (n + 1) * together)), b.at(own, token, FLOAT32))

    def _scores_of(self, queries: Sequence[ir.Value], keys: ir.Value, asked: ir.Value, num: int) -> ir.Value:
        """Of `num` keys, query after query; as many bytes at `asked` are asked for."""
        b = self.b
        zero = b.all_lanes(b.floats, 0.0)
        sums = [[zero] * num for _ in queries]
        for i in range(num):
            self._ask(b.at(asked, i * self._token_bytes))
            for n in range(0, self._size, self.lanes):
                part = b.read_floats(b.at(keys, i * self._size + n, self.kept), self.kept)
                for query, own in zip(queries, sums, strict=True):
                    own[i] = b.fused(part, b.read(b.at(query, n, FLOAT32), b.floats), own[i])
        vectors = [total for own in sums for total in own]
        return b.sums([*vectors, *[zero] * (power_of_two(len(vectors)) - len(vectors))])

    @property
    def _token_bytes(self) -> int:
        return self._size * (4 if self.kept == FLOAT32 else 2)

    def _token(self, tokens: ir.Value, n: Count) -> ir.Value:
        """The address of number `n`."""
        return self.b.at(tokens, self.b.times(n, self._size), self.kept)

    def _ask(self, token: ir.Value) -> None:
        """For what will be read there."""
        for n in range(0, self._token_bytes, LINE_BYTES):
            self.b.prefetch(self.b.at(token, n))

    def _weigh(self, scores: Sequence[ir.Value], seen: ir.Value) -> list[ir.Value]:
        """Scores become weights that are yet to be divided by their sums, which are returned."""
        b = self.b
        scale = 1 / math.sqrt(self._size)
        if self._softcap is not None:
            with b.loop(0, seen, self.lanes) as n:
                for place in (b.at(own, n, FLOAT32) for own in scores):
                    within = b.fmul(b.read(place, b.floats), b.all_lanes(b.floats, scale / self._softcap))
                    b.write(b.fmul(b.tanh(within), b.all_lanes(b.floats, self._softcap)), place)
            scale = 1.0
        largest = [b.variable(b.all_lanes(b.floats, -math.inf)) for _ in scores]
        for own in scores:
            b.write(b.all_lanes(b.floats, -math.inf), b.at(own, seen, FLOAT32))
        with b.loop(0, seen, self.lanes) as n:
            for own, top in zip(scores, largest, strict=True):
                top.set(b.larger_number(b.read(b.at(own, n, FLOAT32), b.floats), top.get()))
        tops = [b.spread(b.largest(top.get())) for top in largest]
        totals = [b.variable(b.all_lanes(b.floats, 0.0)) for _ in scores]
        with b.loop(0, seen, self.lanes) as n:
            for own, top, total in zip(scores, tops, totals, strict=True):
                place = b.at(own, n, FLOAT32)
                below = b.fsub(b.read(place, b.floats), top)
                weights = b.exp(b.fmul(below, b.all_lanes(b.floats, scale)))
                total.set(b.fadd(total.get(), weights))
                b.write(weights, place)
        return [b.sum(total.get()) for total in totals]

    def _mix(
        self, weights: Sequence[ir.Value], sums: Sequence[ir.Value], values: ir.Value, seen: ir.Value, outs: Sequence[ir.Value]
    ) -> None:
        b = self.b
        parts = range(0, self._size, self.lanes)
        mixed = {(i, n): b.variable(b.all_lanes(b.floats, 0.0)) for i in range(len(outs)) for n in parts}
        with b.loop(0, seen) as token:
            value = self._token(values, token)
            self._ask(b.at(value, ASKED_BYTES))
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
