"""Attention of sequences' newest tokens over rows of keys and values, each read once where it lies.

A product of many keys with a single query is what libraries for matrices are worst at: on some processors it reads memory at a
quarter of its rate. The same sums are known elsewhere as the products of a sparse matrix's places (`sampled_addmm`) and as a
weighted bag of embeddings, and those kernels go row by row. They do not ask where rows lie: sequences need not be neighbours.

Shapes as in `attention`; P places in a layer of the cache, each for a token of one head; N of the B sequences in one call.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from asyncpipe_workers.attention import KeysValues, attend_rows, attention_weights
from asyncpipe_workers.layout import Row
from asyncpipe_workers.quickest import Call, quickest

MAX_WASTE = 8192  # scores of padding in one call, which another call would cost

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)


class GatheredRows:
    """Sequences that go on by a token each: where their newest tokens go, and what these see. The same in every layer."""

    def __init__(self, rows: Sequence[Row], window: int | None, *, num_heads: int, shape_SGCK: torch.Size) -> None:
        """For a cache whose layers are tensors of `shape_SGCK`."""
        slots, groups, capacity, _ = shape_SGCK
        heads_BG = torch.tensor([row.slot for row in rows])[:, None] * groups + torch.arange(groups)
        newest_B = torch.tensor([row.length - 1 for row in rows])
        firsts_BG = heads_BG * capacity
        self._newest = (firsts_BG + newest_B[:, None]).flatten()
        num_seen = [row.length if window is None else min(row.length, window) for row in rows]
        self._calls = [
            (among, _Call(firsts_BG[among], newest_B[among], seen, num_heads=num_heads, num_places=slots * groups * capacity))
            for among, seen in _alike(num_seen, num_heads)
        ]

    def attend(self, q_BHK: torch.Tensor, new: KeysValues, cache: KeysValues, softcap: float | None = None) -> torch.Tensor:
        """(B, H, K). `new` are the rows' keys and values, (B, G, K) each, which are written to `cache`, (P, K) each."""
        for kept_PK, new_BGK in zip(cache, new, strict=True):
            kept_PK.index_put_((self._newest,), new_BGK.reshape(-1, kept_PK.shape[1]))
        if len(self._calls) == 1:
            return self._calls[0][1].attend(q_BHK, cache, softcap)
        out_BHK = torch.empty_like(q_BHK)
        for among, call in self._calls:
            out_BHK[among] = call.attend(q_BHK[among], cache, softcap)
        return out_BHK


def _alike(num_seen: Sequence[int], num_heads: int) -> list[tuple[torch.Tensor | slice, list[int]]]:
    """Which of them go together, and how many tokens each of those sees: as many as have little padding, the longest first."""
    order = sorted(range(len(num_seen)), key=lambda index: -num_seen[index])
    calls: list[list[int]] = []
    waste = 0
    for index in order:
        waste += (num_seen[calls[-1][0]] - num_seen[index]) * num_heads if calls else 0
        if not calls or waste > MAX_WASTE:
            calls.append([])
            waste = 0
        calls[-1].append(index)
    if len(calls) == 1:
        return [(slice(None), list(num_seen))]
    return [(torch.tensor(call), [num_seen[index] for index in call]) for call in calls]


class _Call:
    """N rows at once. Who sees fewer tokens than others reads its newest one again, with no weight."""

    def __init__(
        self, firsts_NG: torch.Tensor, newest_N: torch.Tensor, num_seen: list[int], *, num_heads: int, num_places: int
    ) -> None:
        (num, groups), most = firsts_NG.shape, max(num_seen)
        seen_N, steps_C = torch.tensor(num_seen), torch.arange(most)
        tokens_NC = torch.minimum((newest_N + 1 - seen_N)[:, None] + steps_C, newest_N[:, None])
        shared = num_heads // groups
        places_NHC = (firsts_NG.repeat_interleave(shared, 1)[:, :, None] + tokens_NC[:, None]).flatten()
        self._places = places_NHC.to(torch.int32 if max(num_places, len(places_NHC)) < 2**31 else torch.int64)
        ends = torch.arange(0, len(self._places) + 1, most, dtype=self._places.dtype)
        self._starts = ends[:-1]
        self._mask_N11C: torch.Tensor | None = None
        if min(num_seen) < most:
            is_padding_NC = steps_C >= seen_N[:, None]
            self._mask_N11C = torch.zeros(num, most).masked_fill_(is_padding_NC, -math.inf)[:, None, None]
        self._scores = torch.sparse_csr_tensor(
            ends, self._places, torch.zeros(len(self._places)), size=(num * num_heads, num_places), check_invariants=False
        )

    def attend(self, q_NHK: torch.Tensor, kv_PK: KeysValues, softcap: float | None) -> torch.Tensor:
        """(N, H, K)."""
        (num, num_heads, size), (keys_PK, values_PK) = q_NHK.shape, kv_PK
        queries = (q_NHK * (1 / math.sqrt(size))).reshape(num * num_heads, size)
        # What is in `_scores` is multiplied by zero, so it must be numbers, before the first layer and after any.
        torch.sparse.sampled_addmm(self._scores, queries, keys_PK.t(), beta=0.0, out=self._scores)
        scores_NH1C = self._scores.values().view(num, num_heads, 1, -1)
        weights = attention_weights(scores_NH1C, self._mask_N11C, softcap).flatten()
        return F.embedding_bag(self._places, values_PK, self._starts, mode="sum", per_sample_weights=weights).view(q_NHK.shape)


@functools.cache
def gathering_is_quicker(*, shared: int, size: int) -> bool:
    """Than products, for float32 and `shared` heads of `size` to each one of keys and values."""
    num, groups, length = 16, 4, 256

    @functools.cache
    def operands() -> tuple[torch.Tensor, KeysValues]:
        keys, values = (torch.randn(num, groups, length + 44, size) for _ in range(2))
        return torch.randn(num, groups * shared, size), KeysValues(keys, values)

    def products() -> list[Call]:
        q_NHK, (keys, values) = operands()
        return [lambda: attend_rows(q_NHK, keys[:, :, :length], values[:, :, :length])]

    def gathering() -> list[Call]:
        q_NHK, (keys, values) = operands()
        rows = [Row(slot, length) for slot in range(num)]
        gathered = GatheredRows(rows, None, num_heads=groups * shared, shape_SGCK=keys.shape)
        new = KeysValues(*(torch.zeros(num, groups, size) for _ in range(2)))
        return [lambda: gathered.attend(q_NHK, new, KeysValues(keys.view(-1, size), values.view(-1, size)))]

    ways: dict[str, Callable[[], list[Call]]] = {"products": products, "gathering": gathering}
    return quickest(f"attention of {shared} rows of {size}", ways) == "gathering"
