"""Attention of a chunk: the newest tokens of one sequence, over all of its keys and values. Shapes as in `attention`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from asyncpipe_workers.attention import PLAIN, AttentionForm, KeysValues, is_seen, score_bias
from asyncpipe_workers.models.kernels import onednn_linear
from asyncpipe_workers.quickest import Call, quickest

SCORE_NUMBERS = 256 << 10  # that are computed at once: 1 MB, in a core's cache
MIN_SCORES_FOR_PRODUCTS = 128 << 10  # of the heads that share keys; with fewer, calls cost more than is won


def attend_chunk(q_THK: torch.Tensor, kv_GCK: KeysValues, form: AttentionForm = PLAIN) -> torch.Tensor:
    """(T, H, K). The last T of C tokens, each over itself and all before it; in which order those are does not matter, unless
    there is a window."""
    (num, num_heads), (groups, total) = q_THK.shape[:2], kv_GCK.keys_GCK.shape[:2]
    is_long = num * num_heads // groups * total >= MIN_SCORES_FOR_PRODUCTS
    has_kernels = q_THK.dtype == torch.float32 and q_THK.device.type == "cpu"
    if form.softcap is not None or (has_kernels and is_long and products_beat_fused()):
        return _attend_by_products(q_THK, kv_GCK, form)
    return _attend_fused(q_THK, kv_GCK, form)


def _attend_fused(q_THK: torch.Tensor, kv_GCK: KeysValues, form: AttentionForm) -> torch.Tensor:
    (num, num_heads), (groups, total) = q_THK.shape[:2], kv_GCK.keys_GCK.shape[:2]
    is_whole = num == total and (form.window is None or total <= form.window)
    positions_C = torch.arange(total, device=q_THK.device)
    out_1HTK = F.scaled_dot_product_attention(
        q_THK.transpose(0, 1)[None],
        kv_GCK.keys_GCK[None],
        kv_GCK.values_GCK[None],
        attn_mask=None if is_whole else is_seen(positions_C[total - num :], positions_C, form.window),
        is_causal=is_whole,
        enable_gqa=num_heads != groups,
    )
    return out_1HTK[0].transpose(0, 1)


def _attend_by_products(q_THK: torch.Tensor, kv_GCK: KeysValues, form: AttentionForm) -> torch.Tensor:
    """Scores of some queries at a time, so few that they stay in the processor's caches, with the keys that the last of them
    sees. Heads that share keys are rows of one product."""
    (num, num_heads, size), (groups, total) = q_THK.shape, kv_GCK.keys_GCK.shape[:2]
    shared = num_heads // groups
    multiply = onednn_linear if q_THK.dtype == torch.float32 and q_THK.device.type == "cpu" else F.linear
    q_GTRK = (q_THK * (1 / math.sqrt(size))).view(num, groups, shared, size).transpose(0, 1).contiguous()
    out_TGRK = torch.empty_like(q_THK).view(num, groups, shared, size)
    positions_C = torch.arange(total, device=q_THK.device)
    step = max(SCORE_NUMBERS // (shared * total), 1)
    for first in range(0, num, step):
        last = min(first + step, num)
        queries = slice(total - num + first, total - num + last)
        start = 0 if form.window is None else max(queries.start + 1 - form.window, 0)
        unsure = slice(queries.start if form.window is None else start, queries.stop)  # keys that not all of them see
        bias_tU = score_bias(positions_C[queries], positions_C[unsure], form.window)
        for group in range(groups):
            keys_CK, values_CK = (each[group, start : queries.stop] for each in kv_GCK)
            scores_tRC = multiply(q_GTRK[group, first:last].view(-1, size), keys_CK).view(last - first, shared, -1)
            if form.softcap is not None:
                scores_tRC = scores_tRC.float().div_(form.softcap).tanh_().mul_(form.softcap)
            scores_tRC[..., unsure.start - start :] += bias_tU[:, None]
            weights_tRC = torch.softmax(scores_tRC, dim=-1).to(values_CK.dtype)
            out = multiply(weights_tRC.flatten(0, 1), values_CK.t())
            out_TGRK[first:last, group] = out.view(last - first, shared, size)
    return out_TGRK.view(num, num_heads, size)


@functools.cache
def products_beat_fused() -> bool:
    """Whether oneDNN's products beat torch's fused kernel, which is built on another library's, for a long chunk."""

    @functools.cache
    def operands() -> tuple[torch.Tensor, KeysValues]:
        return torch.randn(256, 4, 64), KeysValues(torch.randn(4, 1024, 64), torch.randn(4, 1024, 64))

    ways: dict[str, Callable[[], list[Call]]] = {
        "fused": lambda: [lambda: _attend_fused(*operands(), PLAIN)],
        "products": lambda: [lambda: _attend_by_products(*operands(), PLAIN)],
    }
    return quickest("attention of a chunk", ways) == "products"
