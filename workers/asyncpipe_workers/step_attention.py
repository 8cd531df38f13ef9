"""Causal attention of all rows of a step, over keys and values that are where they are. Shapes as in `attention`; B continuing
sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch

from asyncpipe_workers.attention import QKV, AttentionForm, KeysValues, attend_rows, score_bias
from asyncpipe_workers.chunks import attend_chunk
from asyncpipe_workers.indices import indices
from asyncpipe_workers.layout import Row, RowGroup, Span, StepLayout


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
        keys, values = (each.to(qkv.q_THK.dtype) for each in (keys, values))
        out_BHK[group.rows] = attend_rows(qkv.q_THK[group.rows], keys, values, group.mask_N11C, form.softcap)
    return out_BHK


def _attend_span(qkv: QKV, out_THK: torch.Tensor, span: Span, cache: SpanCache, layer: int, form: AttentionForm) -> None:
    rows, slot = slice(span.start, span.end), span.member.slot
    cache.write_span(layer, slot, span.position, KeysValues(qkv.k_TGK[rows], qkv.v_TGK[rows]))
    first = 0 if form.window is None else max(span.position + 1 - form.window, 0)
    keys, values = cache.read(layer, slice(slot, slot + 1), slice(first, span.position + span.end - span.start))
    out_THK[rows] = attend_chunk(qkv.q_THK[rows], KeysValues(keys[0], values[0]), form)


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
