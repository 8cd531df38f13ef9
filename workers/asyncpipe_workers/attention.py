"""Causal attention of a step's rows over keys and values that are where they are.

Shapes: T rows of a step, B continuing sequences, C cached tokens, H heads, G key-value heads (each for H / G heads), K
head size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from asyncpipe_workers.indices import indices
from asyncpipe_workers.layout import Row, RowGroup, Span, StepLayout
from asyncpipe_workers.models.kernels import onednn_linear
from asyncpipe_workers.quickest import Call, quickest

SCORE_NUMBERS = 256 << 10  # that are computed at once: 1 MB, in a core's cache
MIN_SCORES_FOR_PRODUCTS = 128 << 10  # of the heads that share keys; with fewer, calls cost more than is won


class QKV(NamedTuple):
    """q (T, H, K); k and v (T, G, K)."""

    q_THK: torch.Tensor
    k_TGK: torch.Tensor
    v_TGK: torch.Tensor


class KeysValues(NamedTuple):
    """Each (G, C, K), C the tokens asked for."""

    keys_GCK: torch.Tensor
    values_GCK: torch.Tensor


class AttentionForm(NamedTuple):
    """What some families add. Scores are scaled by 1 / sqrt(K); a family that wants another scale scales its queries."""

    window: int | None = None  # tokens that each one sees, itself among them; None: all before it
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.softcap is None


PLAIN = AttentionForm()


class SpanCache(Protocol):
    """Keys and values that are written, and read as one tensor."""

    def attend_rows(self, layer: int, qkv: QKV, layout: StepLayout, form: AttentionForm) -> torch.Tensor:
        """(B, H, K), of the rows that continue a sequence each; their keys and values are written."""
        ...

    def write_span(self, layer: int, slot: int, start: int, kv_TGK: KeysValues) -> None:
        """Tokens from position `start` on of one sequence."""
        ...

    def read(self, layer: int, slots: slice, places: slice) -> KeysValues:
        """(S, G, C, K) each, of neighbouring slots; to be used before the next write."""
        ...


class GroupCache(SpanCache, Protocol):
    """One that attends to sequences in neighbouring slots together."""

    most_padding: int  # tokens that may be read in vain for each row, if that lets sequences be attended to together

    def write_rows(self, layer: int, group: RowGroup, kv_NGK: KeysValues) -> None:
        """The new token of each of the group's sequences."""
        ...


def attend(qkv: QKV, layout: StepLayout, cache: SpanCache, layer: int, form: AttentionForm) -> torch.Tensor:
    """(T, H, K). The rows' keys and values are written to `cache`."""
    if len(layout.rows) == len(qkv.q_THK):
        return cache.attend_rows(layer, qkv, layout, form)
    out_THK = torch.empty_like(qkv.q_THK)
    if layout.rows:
        out_THK[: len(layout.rows)] = cache.attend_rows(layer, qkv, layout, form)
    for span in layout.spans:
        _attend_span(qkv, out_THK, span, cache, layer, form)
    if layout.padding:
        out_THK[len(out_THK) - layout.padding :] = 0
    return out_THK


def attend_groups(cache: GroupCache, layer: int, qkv: QKV, layout: StepLayout, form: AttentionForm) -> torch.Tensor:
    """`SpanCache.attend_rows`, by products."""
    out_BHK = torch.empty_like(qkv.q_THK[: len(layout.rows)])
    for group in groups_of(layout, form.window, cache.most_padding):
        cache.write_rows(layer, group, KeysValues(qkv.k_TGK[group.rows], qkv.v_TGK[group.rows]))
        keys, values = cache.read(layer, slice(group.first_slot, group.first_slot + group.num), group.places)
        out_BHK[group.rows] = attend_rows(qkv.q_THK[group.rows], keys, values, group.mask_N11C, form.softcap)
    return out_BHK


def attend_rows(
    q_NHK: torch.Tensor,
    keys_NGCK: torch.Tensor,
    values_NGCK: torch.Tensor,
    mask_N11C: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """(N, H, K): one new token of each of N sequences. Heads that share keys are rows of one product."""
    (num, num_heads, size), groups = q_NHK.shape, keys_NGCK.shape[1]
    q_NGRK = q_NHK.reshape(num, groups, num_heads // groups, size)
    if softcap is None and (q_NHK.dtype != torch.float32 or q_NHK.device.type != "cpu"):
        mask = None if mask_N11C is None else mask_N11C.to(q_NHK.dtype)
        out = F.scaled_dot_product_attention(q_NGRK, keys_NGCK, values_NGCK, attn_mask=mask)
        return out.reshape(q_NHK.shape)
    # On CPUs two products are quicker than the fused kernel, which is made for many queries.
    scores_NGRC = _scores(q_NGRK * (1 / math.sqrt(size)), keys_NGCK).float()
    weights_NGRC = attention_weights(scores_NGRC, mask_N11C, softcap).to(values_NGCK.dtype)
    return torch.matmul(weights_NGRC, values_NGCK).reshape(q_NHK.shape)


def attention_weights(scores_NGRC: torch.Tensor, mask_N11C: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
    """Of float32 scores, which may be overwritten, but only with numbers."""
    if softcap is not None:
        scores_NGRC = scores_NGRC.div_(softcap).tanh_().mul_(softcap)
    if mask_N11C is not None:
        scores_NGRC = scores_NGRC + mask_N11C
    return torch.softmax(scores_NGRC, dim=-1)


def _scores(q_NGRK: torch.Tensor, keys_NGCK: torch.Tensor) -> torch.Tensor:
    """(N, G, R, C). Keys times one query is a quarter quicker than the query times keys that are turned."""
    if q_NGRK.shape[2] == 1:
        return torch.matmul(keys_NGCK, q_NGRK.transpose(-1, -2)).transpose(-1, -2)
    return torch.matmul(q_NGRK, keys_NGCK.transpose(-1, -2))


def _attend_span(qkv: QKV, out_THK: torch.Tensor, span: Span, cache: SpanCache, layer: int, form: AttentionForm) -> None:
    rows, slot = slice(span.start, span.end), span.member.slot
    cache.write_span(layer, slot, span.position, KeysValues(qkv.k_TGK[rows], qkv.v_TGK[rows]))
    first = 0 if form.window is None else max(span.position + 1 - form.window, 0)
    keys, values = cache.read(layer, slice(slot, slot + 1), slice(first, span.position + span.end - span.start))
    out_THK[rows] = attend_chunk(qkv.q_THK[rows], KeysValues(keys[0], values[0]), form)


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
        attn_mask=None if is_whole else _is_seen(positions_C[total - num :], positions_C, form.window),
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


def score_bias(queries_T: torch.Tensor, keys_C: torch.Tensor, window: int | None) -> torch.Tensor:
    """(T, C): of these positions, to be added to scores: 0 where the query sees the key, else -inf."""
    is_seen_TC = _is_seen(queries_T, keys_C, window)
    return torch.zeros(is_seen_TC.shape, device=is_seen_TC.device).masked_fill_(~is_seen_TC, -math.inf)


def _is_seen(queries_T: torch.Tensor, keys_C: torch.Tensor, window: int | None) -> torch.Tensor:
    distances_TC = queries_T[:, None] - keys_C
    is_seen_TC = distances_TC >= 0
    return is_seen_TC if window is None else is_seen_TC.logical_and_(distances_TC < window)


# --- sequences side by side -------------------------------------------------------------------------------------------


def groups_of(layout: StepLayout, window: int | None, most_padding: int) -> list[RowGroup]:
    """The step's continuing rows, together where their slots are neighbours and their lengths alike; found once in a step."""
    groups = layout.groups.get(window)
    if groups is None:
        groups = layout.groups[window] = group_rows(layout.rows, window, most_padding, layout.positions_T.device)
    return groups


def group_rows(rows: Sequence[Row], window: int | None, most_padding: int, device: torch.device) -> list[RowGroup]:
    """As `groups_of`, of any rows."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].slot)
    runs: list[list[int]] = []
    longest = total = 0
    for index in order:
        slot, length = rows[index]
        run = runs[-1] if runs else []
        new_longest, new_total = max(longest, length), total + length
        fits = new_longest * (len(run) + 1) - new_total <= most_padding * (len(run) + 1)
        if run and rows[run[-1]].slot + 1 == slot and fits:
            run.append(index)
            longest, total = new_longest, new_total
        else:
            runs.append([index])
            longest = total = length
    return [_row_group(run, rows, window, device) for run in runs]


def _row_group(run: Sequence[int], rows: Sequence[Row], window: int | None, device: torch.device) -> RowGroup:
    newest = tuple(rows[index].length - 1 for index in run)
    places = slice(0 if window is None else max(min(newest) + 1 - window, 0), max(newest) + 1)
    mask = None
    if len(set(newest)) > 1:
        positions_C = torch.arange(places.start, places.stop, device=device)
        mask = score_bias(indices(newest, device), positions_C, window)[:, None, None]
    is_sorted = all(after == before + 1 for before, after in itertools.pairwise(run))
    members: slice | torch.Tensor = slice(run[0], run[-1] + 1) if is_sorted else indices(run, device)
    return RowGroup(members, rows[run[0]].slot, len(run), places, newest, mask)
