"""Attention of a chunk: the newest tokens of one sequence, over all of its keys and values. Shapes as in `attention`."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from asyncpipe_workers.attention import PLAIN, AttentionForm, KeysValues, attention_weights, is_seen, score_bias
from asyncpipe_workers.quickest import Call, quickest

SCORE_NUMBERS = 256 << 10  # that are computed at once: 1 MB, in a core's cache
MIN_ROWS_TO_COMPILE = 32  # queries times heads that share keys: half of a tile


def attend_chunk(q_THK: torch.Tensor, kv_GCK: KeysValues, form: AttentionForm = PLAIN) -> torch.Tensor:
    """(T, H, K). The last T of C tokens, each over itself and all before it; in which order those are does not matter, unless
    there is a window."""
    (num, num_heads, size), groups = q_THK.shape, len(kv_GCK.keys_GCK)
    shared = num_heads // groups
    attention, kept = None, kv_GCK.keys_GCK.dtype
    if q_THK.dtype == torch.float32 and q_THK.device.type == "cpu" and num * shared >= MIN_ROWS_TO_COMPILE:
        attention = compiled_attention(shared=shared, size=size, softcap=form.softcap, kept=kept)
    if attention is not None:
        return attention(q_THK, kv_GCK, form.window)
    kv_GCK = KeysValues(*(each.to(q_THK.dtype) for each in kv_GCK))
    if form.softcap is None:
        return _attend_fused(q_THK, kv_GCK, form.window)
    return _attend_with_softcap(q_THK, kv_GCK, form.softcap, form.window)


@functools.cache
def compiled_attention(*, shared: int, size: int, softcap: float | None, kept: torch.dtype) -> CompiledAttention | None:
    """None where torch is as quick, or all that there is."""
    with contextlib.suppress(ImportError, NotImplementedError):
        if _beats_torch(shared=shared, size=size):
            return CompiledAttention(shared=shared, size=size, softcap=softcap, kept=kept)
    return None


def _beats_torch(*, shared: int, size: int) -> bool:
    @functools.cache
    def operands() -> tuple[torch.Tensor, KeysValues]:
        num, groups, total = 256, 4, 1024
        return torch.randn(num, groups * shared, size), KeysValues(*(torch.randn(groups, total, size) for _ in range(2)))

    def compiled() -> list[Call]:
        attention = CompiledAttention(shared=shared, size=size, softcap=None)
        return [lambda: attention(*operands())]

    ways: dict[str, Callable[[], list[Call]]] = {
        "torch": lambda: [lambda: _attend_fused(*operands(), window=None)],
        "compiled": compiled,
    }
    return quickest(f"attention of a chunk, {shared} rows of {size}", ways) == "compiled"


class CompiledAttention:
    """In float32, for `shared` heads of `size` to each one of keys and values, which are `kept` in float32 or float16. Raises
    NotImplementedError where no such kernel is, and ImportError where there is no compiler."""

    def __init__(self, *, shared: int, size: int, softcap: float | None, kept: torch.dtype = torch.float32) -> None:
        from asyncpipe_workers.compiled.chunk_attention import ChunkAttention, ChunkAttention16, scratch_bytes
        from asyncpipe_workers.compiled.compiler import compiled

        kinds = {torch.float32: ChunkAttention, torch.float16: ChunkAttention16}
        if kept not in kinds:
            raise NotImplementedError(f"no kernel for keys and values in {kept}")
        self._kernel = compiled(kinds[kept], shared, size, softcap)
        self._scratch_bytes = functools.partial(scratch_bytes, size, self._kernel.lanes)

    def __call__(self, q_THK: torch.Tensor, kv_GCK: KeysValues, window: int | None = None) -> torch.Tensor:
        """As `attend_chunk`."""
        q, keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (q_THK, *kv_GCK))
        if q.stride(1) != q.shape[2]:
            q = q.contiguous()
        groups, total = keys.shape[:2]
        out_THK = torch.empty(q.shape)
        scratch = torch.empty(self._scratch_bytes(torch.get_num_threads()), dtype=torch.uint8)
        strides = (q.stride(0), *keys.stride()[:2], *values.stride()[:2])
        self._kernel((q, keys, values, out_THK, scratch), (len(q), groups, total, window or total, *strides))
        return out_THK


def _attend_fused(q_THK: torch.Tensor, kv_GCK: KeysValues, window: int | None) -> torch.Tensor:
    (num, num_heads), (groups, total) = q_THK.shape[:2], kv_GCK.keys_GCK.shape[:2]
    is_whole = num == total and (window is None or total <= window)
    positions_C = torch.arange(total, device=q_THK.device)
    out_1HTK = F.scaled_dot_product_attention(
        q_THK.transpose(0, 1)[None],
        kv_GCK.keys_GCK[None],
        kv_GCK.values_GCK[None],
        attn_mask=None if is_whole else is_seen(positions_C[total - num :], positions_C, window),
        is_causal=is_whole,
        enable_gqa=num_heads != groups,
    )
    return out_1HTK[0].transpose(0, 1)


def _attend_with_softcap(q_THK: torch.Tensor, kv_GCK: KeysValues, softcap: float, window: int | None) -> torch.Tensor:
    """By products, which torch's fused kernel has no softcap for. Scores are of some queries at a time, with the keys that the
    last of them sees. Heads that share keys are rows of one product."""
    (num, num_heads, size), (groups, total) = q_THK.shape, kv_GCK.keys_GCK.shape[:2]
    shared = num_heads // groups
    q_GTRK = (q_THK * (1 / math.sqrt(size))).view(num, groups, shared, size).transpose(0, 1).contiguous()
    out_TGRK = torch.empty_like(q_THK).view(num, groups, shared, size)
    positions_C = torch.arange(total, device=q_THK.device)
    step = max(SCORE_NUMBERS // (shared * total), 1)
    for first in range(0, num, step):
        last = min(first + step, num)
        queries = slice(total - num + first, total - num + last)
        start = 0 if window is None else max(queries.start + 1 - window, 0)
        bias_tC = score_bias(positions_C[queries], positions_C[start : queries.stop], window)
        for group in range(groups):
            keys_CK, values_CK = (each[group, start : queries.stop] for each in kv_GCK)
            scores_tRC = F.linear(q_GTRK[group, first:last], keys_CK).float()
            weights_tRC = attention_weights(scores_tRC, bias_tC[:, None], softcap).to(values_CK.dtype)
            out_TGRK[first:last, group] = torch.matmul(weights_tRC, values_CK)
    return out_TGRK.view(num, num_heads, size)
