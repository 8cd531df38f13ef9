"""Attention of sequences' newest tokens over rows of keys and values, each read once where it lies.

A product of many keys with a single query is what libraries for matrices are worst at: on some processors it reads memory at a
quarter of its rate. The same sums are known elsewhere as the products of a sparse matrix's places (`sampled_addmm`) and as a
weighted bag of embeddings, and those kernels go row by row.

Shapes as in `attention`; P places for a token of one head in the cache.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from asyncpipe_workers.attention import KeysValues, attend_rows, attention_weights
from asyncpipe_workers.layout import RowGroup
from asyncpipe_workers.quickest import Call, quickest

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)


class Gathering:
    """Which places the heads of a group's rows see: the same in every layer of a step."""

    def __init__(self, group: RowGroup, *, num_heads: int, shape_SGCK: torch.Size) -> None:
        """For a cache whose layers are tensors of `shape_SGCK`."""
        slots, groups, capacity, _ = shape_SGCK
        num_places, num_rows = slots * groups * capacity, group.num * num_heads
        dtype = torch.int32 if max(num_places, num_rows * capacity) < 2**31 else torch.int64
        first_M = torch.arange(group.first_slot * groups, (group.first_slot + group.num) * groups, dtype=dtype) * capacity
        seen_C = torch.arange(group.places.start, group.places.stop, dtype=dtype)
        self._places = (first_M.repeat_interleave(num_heads // groups)[:, None] + seen_C).flatten()
        ends = torch.arange(0, len(self._places) + 1, len(seen_C), dtype=dtype)
        self._starts = ends[:-1]
        self._scores = torch.sparse_csr_tensor(
            ends, self._places, torch.zeros(len(self._places)), size=(num_rows, num_places), check_invariants=False
        )

    def attend(
        self, q_NHK: torch.Tensor, kv_PK: KeysValues, mask_N11C: torch.Tensor | None = None, softcap: float | None = None
    ) -> torch.Tensor:
        """(N, H, K), over all of a layer's keys and values, one after the other."""
        (num, num_heads, size), (keys_PK, values_PK) = q_NHK.shape, kv_PK
        queries = (q_NHK * (1 / math.sqrt(size))).reshape(num * num_heads, size)
        # What is in `_scores` is multiplied by zero, so it must be numbers, before the first layer and after any.
        torch.sparse.sampled_addmm(self._scores, queries, keys_PK.t(), beta=0.0, out=self._scores)
        scores_NH1C = self._scores.values().view(num, num_heads, 1, -1)
        weights = attention_weights(scores_NH1C, mask_N11C, softcap).flatten()
        return F.embedding_bag(self._places, values_PK, self._starts, mode="sum", per_sample_weights=weights).view(q_NHK.shape)


@functools.cache
def gathering_is_quicker(*, shared: int, size: int) -> bool:
    """Than products, for float32 and `shared` heads of `size` to each one of keys and values."""
    group = RowGroup(rows=slice(0, 16), first_slot=0, num=16, places=slice(0, 256), newest=(255,) * 16, mask_N11C=None)

    @functools.cache
    def operands() -> tuple[torch.Tensor, KeysValues]:
        return torch.randn(16, 4 * shared, size), KeysValues(torch.randn(16, 4, 300, size), torch.randn(16, 4, 300, size))

    def products() -> list[Call]:
        q_NHK, (keys, values) = operands()
        return [lambda: attend_rows(q_NHK, keys[:, :, group.places], values[:, :, group.places])]

    def gathering() -> list[Call]:
        q_NHK, (keys, values) = operands()
        gathered = Gathering(group, num_heads=q_NHK.shape[1], shape_SGCK=keys.shape)
        return [lambda: gathered.attend(q_NHK, KeysValues(keys.view(-1, size), values.view(-1, size)))]

    ways: dict[str, Callable[[], list[Call]]] = {"products": products, "gathering": gathering}
    return quickest(f"attention of {shared} rows of {size}", ways) == "gathering"
