"""The instructions of attention of a chunk's tokens, in float32, block after block of keys (Dao et al. 2022: FlashAttention).

Lanes are queries. A thread turns a tile of them once, and then takes keys and values number by number from where they lie:
scores stay in the first caches, their maxima and sums never go from lane to lane, and what a query gives does not depend on the
others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir

from asyncpipe_workers.compiled.builder import FLOAT16, FLOAT32, LINE_BYTES, WORD, Builder, Count, Variable
from asyncpipe_workers.compiled.kernel import HALF_FEATURES, Kernel

ADDRESSES = ("q", "keys", "values", "out", "scratch")
COUNTS = ("queries", "groups", "total", "window", "q_row", "keys_head", "keys_token", "values_head", "values_token")
"""q and out (T, H, K); keys and values (G, C, K); rows of q, heads and tokens of keys and of values are so many numbers apart.

Query t sees the newest `window` of the first C - T + t + 1 of the `total` C tokens. Keys and values are of the type that is
kept, everything else is float32. Scratch has room for `scratch_bytes`.
"""

BLOCK = 64  # keys, counted from the first, whose scores are there at once
NUMBERS = 4  # of a head; or keys; that are multiplied with a tile at a time, their sums in half of the registers
NUMBER_BYTES: dict[ir.Type, int] = {FLOAT32: 4, FLOAT16: 2}
LOWEST = -1e30  # before a score is known: less than any, and yet a number


def tile_vectors(lanes: int) -> int:
    """There are twice as many registers of 16 lanes as of 8."""
    return lanes // 4


def scratch_bytes(size: int, lanes: int, num_threads: int) -> int:
    return num_threads * ((2 * size + BLOCK + 1) * tile_vectors(lanes) * lanes + BLOCK * size) * 4


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows, each a head of a query, that a thread has at a time. What is turned has number after number, and in each row after
    row; scores have key after key, and in each row after row."""

    first: ir.Value
    num: ir.Value
    group: ir.Value
    turned_queries: ir.Value
    turned_sums: ir.Value  # of values times their weights
    scores: ir.Value
    newest: ir.Value  # the last key that each row sees
    block: ir.Value  # keys or values, if they are not kept in float32
    tops: Sequence[Variable]  # the largest score so far
    totals: Sequence[Variable]  # of weights so far


@dataclass(frozen=True, slots=True)
class _Block:
    """Keys or values in float32, which are so many numbers apart."""

    first: ir.Value
    token_numbers: ir.Value

    def token(self, b: Builder, n: Count) -> ir.Value:
        return b.at(self.first, b.times(n, self.token_numbers), FLOAT32)


class ChunkAttention(Kernel):
    """For `shared` heads of `size` to each one of keys and values. Raises NotImplementedError for a size that is no multiple of
    NUMBERS or, where keys and values are widened, of `lanes`."""

    kept: ClassVar[ir.Type] = FLOAT32

    def __init__(self, lanes: int, shared: int, size: int, softcap: float | None = None) -> None:
        if size % (NUMBERS if self.kept == FLOAT32 else lanes):
            raise NotImplementedError(f"no attention of chunks for heads of {size}")
        self._shared = shared
        self._size = size
        self._softcap = softcap
        self._vectors = range(tile_vectors(lanes))
        self._tile_rows = len(self._vectors) * lanes
        super().__init__(lanes, ADDRESSES, COUNTS)

    def build(self) -> None:
        b = self.b
        queries, groups, total, window = (self.arguments[name] for name in ("queries", "groups", "total", "window"))
        rows = b.times(queries, self._shared)
        num_tiles = b.over(b.plus(rows, self._tile_rows - 1), self._tile_rows)
        with self.shared(b.times(num_tiles, groups)) as n:
            which = b.sub(b.sub(num_tiles, b.count(1)), b.over(n, groups))  # that which sees most is first
            tile = self._tile(b.times(which, self._tile_rows), rows, b.urem(n, groups))
            self._take_queries(tile)
            before = b.sub(total, queries)
            first_newest = b.plus(before, b.over(tile.first, self._shared))
            begin = b.at_least(b.sub(b.plus(first_newest, 1), window), 0)
            end = b.plus(before, b.over(b.plus(tile.first, tile.num, -1), self._shared), 1)
            with b.loop(b.whole(begin, BLOCK), end, BLOCK) as first:
                num = b.at_most(b.sub(end, first), BLOCK)
                self._score(tile, first, num)
                factors = self._weigh(tile, first, num)
                self._mix(tile, first, num, factors)
            self._give_results(tile)

    def _tile(self, first: ir.Value, rows: ir.Value, group: ir.Value) -> _Tile:
        b = self.b
        turned = self._size * self._tile_rows
        own = b.at(self.arguments["scratch"], b.times(self.thread(), scratch_bytes(self._size, self.lanes, num_threads=1)))
        newest = 2 * turned + BLOCK * self._tile_rows
        offsets = (0, turned, 2 * turned, newest, newest + self._tile_rows)
        queries, sums, scores, newest_keys, block = (b.at(own, offset, FLOAT32) for offset in offsets)
        num = b.at_most(b.sub(rows, first), self._tile_rows)
        tops, totals = ([b.variable(b.all_lanes(b.floats, value)) for _ in self._vectors] for value in (LOWEST, 0.0))
        return _Tile(first, num, group, queries, sums, scores, newest_keys, block, tops, totals)

    # --- a tile ---

    def _take_queries(self, tile: _Tile) -> None:
        """The tile's last row once more for every row that it lacks. There are no sums yet."""
        b = self.b
        scale = ir.Constant(FLOAT32, 1 / math.sqrt(self._size))
        before = b.sub(self.arguments["total"], self.arguments["queries"])
        with b.loop(0, self._tile_rows) as i:
            token, head = self._token_and_head(tile, b.at_most(i, b.plus(tile.num, -1)))
            b.write(b.trunc(b.plus(before, token), WORD), b.at(tile.newest, i, WORD))
            place = b.plus(b.times(token, self.arguments["q_row"]), b.times(head, self._size))
            query = b.at(self.arguments["q"], place, FLOAT32)
            with b.loop(0, self._size) as n:
                number = b.fmul(b.read(b.at(query, n, FLOAT32), FLOAT32), scale)
                b.write(number, b.at(self._row(tile.turned_queries, n), i, FLOAT32))
        with b.loop(0, self._size) as n:
            self._write_row([b.all_lanes(b.floats, 0.0)] * len(self._vectors), self._row(tile.turned_sums, n))

    def _give_results(self, tile: _Tile) -> None:
        b = self.b
        self._write_row([b.fdiv(b.all_lanes(b.floats, 1.0), total.get()) for total in tile.totals], tile.scores)
        with b.loop(0, tile.num) as i:
            token, head = self._token_and_head(tile, i)
            place = b.times(b.plus(b.times(token, self.arguments["groups"], self._shared), head), self._size)
            out = b.at(self.arguments["out"], place, FLOAT32)
            factor = b.read(b.at(tile.scores, i, FLOAT32), FLOAT32)
            with b.loop(0, self._size) as n:
                total = b.read(b.at(self._row(tile.turned_sums, n), i, FLOAT32), FLOAT32)
                b.write(b.fmul(total, factor), b.at(out, n, FLOAT32))

    def _token_and_head(self, tile: _Tile, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Of the tile's row `i`."""
        b = self.b
        row = b.plus(tile.first, i)
        return b.over(row, self._shared), b.plus(b.times(tile.group, self._shared), b.urem(row, b.count(self._shared)))

    # --- a block of keys ---

    def _score(self, tile: _Tile, first: ir.Value, num: ir.Value) -> None:
        """Of `num` keys from `first` on."""
        b = self.b
        block = self._block(tile, "keys", first, num)
        done: Count = 0
        for together in (NUMBERS, 1):
            num_together = b.over(b.sub(num, b.count(done)), together)
            with b.loop(0, num_together) as which:
                key = b.plus(done, b.times(which, together))
                keys = [block.token(b, b.plus(key, n)) for n in range(together)]

                def places(n: ir.Value, keys: Sequence[ir.Value] = keys) -> list[ir.Value]:
                    return [b.at(own, n, FLOAT32) for own in keys]

                zeros = [[b.all_lanes(b.floats, 0.0)] * len(self._vectors)] * together
                scores = self._sums(zeros, self._size, tile.turned_queries, places)
                for n, each in enumerate(scores):
                    self._write_row(each, self._row(tile.scores, b.plus(key, n)))
            done = b.plus(done, b.times(num_together, together))

    def _weigh(self, tile: _Tile, first: ir.Value, num: ir.Value) -> Sequence[ir.Value]:
        """Scores become weights, which are zero where a key is not seen. Returns what sums so far are to be multiplied by."""
        b = self.b
        newest = [b.read(b.at(tile.newest, v * self.lanes, WORD), b.words) for v in self._vectors]
        window = b.spread(b.trunc(self.arguments["window"], WORD))
        unseen = b.all_lanes(b.floats, -math.inf)
        old_tops = [top.get() for top in tile.tops]
        with b.loop(0, num) as i:
            row = self._row(tile.scores, i)
            key = b.spread(b.trunc(b.plus(first, i), WORD))
            self._ask_for(tile, "values", b.plus(first, i))
            scores = []
            for score, last, top in zip(self._read_row(row), newest, tile.tops, strict=True):
                is_seen = b.and_(b.icmp_signed("<=", key, last), b.icmp_signed("<", b.sub(last, key), window))
                scores.append(b.select(is_seen, self._capped(score), unseen))
                top.set(b.larger_number(scores[-1], top.get()))
            self._write_row(scores, row)
        tops = [top.get() for top in tile.tops]
        factors = [b.exp(b.fsub(old, top)) for old, top in zip(old_tops, tops, strict=True)]
        for total, factor in zip(tile.totals, factors, strict=True):
            total.set(b.fmul(total.get(), factor))
        with b.loop(0, num) as i:
            row = self._row(tile.scores, i)
            self._ask_for(tile, "keys", b.plus(first, i, BLOCK))
            weights = []
            for score, top, total in zip(self._read_row(row), tops, tile.totals, strict=True):
                is_unseen = b.fcmp_ordered("==", score, unseen)
                weights.append(b.select(is_unseen, b.all_lanes(b.floats, 0.0), b.exp(b.fsub(score, top))))
                total.set(b.fadd(total.get(), weights[-1]))
            self._write_row(weights, row)
        return factors

    def _capped(self, score: ir.Value) -> ir.Value:
        if self._softcap is None:
            return score
        b = self.b
        within = b.fmul(score, b.all_lanes(b.floats, 1 / self._softcap))
        return b.fmul(b.tanh(within), b.all_lanes(b.floats, self._softcap))

    def _mix(self, tile: _Tile, first: ir.Value, num: ir.Value, factors: Sequence[ir.Value]) -> None:
        """Values times their weights are added to the sums, after those are multiplied by `factors`."""
        b, block = self.b, self._block(tile, "values", first, num)
        with b.loop(0, self._size, NUMBERS) as number:
            rows = [self._row(tile.turned_sums, b.plus(number, n)) for n in range(NUMBERS)]
            old = [[b.fmul(*pair) for pair in zip(self._read_row(row), factors, strict=True)] for row in rows]

            def places(key: ir.Value, number: ir.Value = number) -> list[ir.Value]:
                value = block.token(b, key)
                return [b.at(value, b.plus(number, n), FLOAT32) for n in range(NUMBERS)]

            for row, new in zip(rows, self._sums(old, num, tile.scores, places), strict=True):
                self._write_row(new, row)

    def _sums(
        self,
        old: Sequence[Sequence[ir.Value]],
        num: Count,
        rows: ir.Value,
        places: Callable[[ir.Value], Sequence[ir.Value]],
    ) -> list[list[ir.Value]]:
        """`old`, and for each n below `num` row n times the numbers at places(n)."""
        b = self.b
        sums = [[b.variable(value) for value in each] for each in old]
        with b.loop(0, num) as n:
            row = self._read_row(self._row(rows, n))
            for each, place in zip(sums, places(n), strict=True):
                number = b.spread(b.read(place, FLOAT32))
                for total, vector in zip(each, row, strict=True):
                    total.set(b.fused(vector, number, total.get()))
        return [[total.get() for total in each] for each in sums]

    # --- addresses and counts ---

    def _place(self, tile: _Tile, of: str, token: ir.Value) -> ir.Value:
        """Of its keys or values, where they lie."""
        b = self.b
        number = b.plus(b.times(tile.group, self.arguments[f"{of}_head"]), b.times(token, self.arguments[f"{of}_token"]))
        return b.at(self.arguments[of], number, self.kept)

    def _block(self, tile: _Tile, of: str, first: ir.Value, num: ir.Value) -> _Block:
        """`num` keys or values from `first` on: where they lie, or as float32 in scratch."""
        b = self.b
        token_numbers, own = self.arguments[f"{of}_token"], self._place(tile, of, first)
        if self.kept == FLOAT32:
            return _Block(own, token_numbers)
        block = _Block(tile.block, b.count(self._size))
        with b.loop(0, num) as token:
            source, target = b.at(own, b.times(token, token_numbers), self.kept), block.token(b, token)
            for n in range(0, self._size, self.lanes):
                b.write(b.read_floats(b.at(source, n, self.kept), self.kept), b.at(target, n, FLOAT32))
        return block

    def _ask_for(self, tile: _Tile, of: str, token: ir.Value) -> None:
        """Its keys or values come to the first cache while something else is computed."""
        own = self._place(tile, of, token)
        for n in range(0, self._size * NUMBER_BYTES[self.kept], LINE_BYTES):
            self.b.prefetch_to_keep(self.b.at(own, n))

    def _row(self, rows: ir.Value, n: Count) -> ir.Value:
        """Of a tile."""
        return self.b.at(rows, self.b.times(n, self._tile_rows), FLOAT32)

    def _read_row(self, row: ir.Value) -> list[ir.Value]:
        return [self.b.read(self.b.at(row, v * self.lanes, FLOAT32), self.b.floats) for v in self._vectors]

    def _write_row(self, vectors: Sequence[ir.Value], row: ir.Value) -> None:
        for v, vector in enumerate(vectors):
            self.b.write(vector, self.b.at(row, v * self.lanes, FLOAT32))


class ChunkAttention16(ChunkAttention):
    """Over keys and values in float16."""

    features = HALF_FEATURES
    kept = FLOAT16
