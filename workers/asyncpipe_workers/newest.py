"""Attention of sequences' newest tokens by a kernel that is compiled here, which also writes their keys and values.

It does not ask where sequences lie: they need not be neighbours. Shapes as in `attention`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch

from asyncpipe_workers.attention import QKV, KeysValues, attend_rows
from asyncpipe_workers.layout import Row, Seen
from asyncpipe_workers.quickest import Call, quickest
from asyncpipe_workers.tape import new_tensor


class NewestAttention:
    """In float32, for `shared` heads of `size` to each one of keys and values, which are `kept` in float32 or float16. Raises
    NotImplementedError where no such kernel is, and ImportError where there is no compiler."""

    def __init__(self, *, shared: int, size: int, softcap: float | None, kept: torch.dtype = torch.float32) -> None:
        from asyncpipe_workers.compiled.attention import RowAttention, RowAttention16, scratch_bytes
        from asyncpipe_workers.compiled.compiler import compiled

        kinds = {torch.float32: RowAttention, torch.float16: RowAttention16}
        if kept not in kinds:
            raise NotImplementedError(f"no kernel for keys and values in {kept}")
        self._kernel = compiled(kinds[kept], shared, size, softcap)
        self._scratch_bytes = functools.partial(scratch_bytes, size=size, lanes=self._kernel.lanes)

    def __call__(self, qkv: QKV, cache: KeysValues, seen: Seen) -> torch.Tensor:
        """(B, H, K), of the first B rows. `cache` (S, G, C, K) each, which their keys and values are written to."""
        count = len(seen.sequences_B3)
        q, k, v = (each if each.stride()[1:] == (each.shape[2], 1) else each.contiguous() for each in qkv)
        groups, capacity = cache.keys_GCK.shape[1:3]
        out_BHK = new_tensor(count, *q.shape[1:])
        scratch = new_tensor(self._scratch_bytes(seen.longest, num_threads=torch.get_num_threads()), dtype=torch.uint8)
        tensors = (q, k, v, *cache, seen.sequences_B3, out_BHK, scratch)
        self._kernel(tensors, (count, groups, capacity, q.stride(0), k.stride(0), v.stride(0), seen.longest))
        return out_BHK


@functools.cache
def newest_attention(*, shared: int, size: int, softcap: float | None, kept: torch.dtype) -> NewestAttention | None:
    """None where products are as quick, or all that there is."""
    with contextlib.suppress(ImportError, NotImplementedError):
        if _beats_products(shared=shared, size=size, kept=kept):
            return NewestAttention(shared=shared, size=size, softcap=softcap, kept=kept)
    return None


def _beats_products(*, shared: int, size: int, kept: torch.dtype) -> bool:
    num, groups, length = 16, 4, 256

    @functools.cache
    def operands() -> tuple[QKV, KeysValues]:
        keys, values = (torch.randn(num, groups, length + 44, size).to(kept) for _ in range(2))
        k, v = (torch.randn(num, groups, size) for _ in range(2))
        return QKV(torch.randn(num, groups * shared, size), k, v), KeysValues(keys, values)

    def products() -> list[Call]:
        qkv, (keys, values) = operands()
        return [lambda: attend_rows(qkv.q_THK, keys[:, :, :length].float(), values[:, :, :length].float())]

    def compiled() -> list[Call]:
        attention = NewestAttention(shared=shared, size=size, softcap=None, kept=kept)
        seen = Seen.of([Row(slot, length) for slot in range(num)], None)
        return [lambda: attention(*operands(), seen)]

    ways: dict[str, Callable[[], list[Call]]] = {"products": products, "compiled": compiled}
    what = f"attention of {shared} rows of {size}"
    return quickest(what if kept == torch.float32 else f"{what} in {kept}", ways) == "compiled"
