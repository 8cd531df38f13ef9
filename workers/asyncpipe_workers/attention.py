"""Causal attention of a step's rows over keys and values that are where they are.

Shapes: T rows of a step, B continuing sequences, C cached tokens, H heads, K head size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from asyncpipe_workers.layout import Span, StepLayout


class QKV(NamedTuple):
    """Each (T, H, K)."""

    q_THK: torch.Tensor
    k_THK: torch.Tensor
    v_THK: torch.Tensor


class KeysValues(NamedTuple):
    """Each (H, C, K), C the tokens asked for."""

    keys_HCK: torch.Tensor
    values_HCK: torch.Tensor


class ReadableCache(Protocol):
    """Keys and values that are written, and read as one tensor."""

    def write_rows(self, layer: int, slots_B: torch.Tensor, positions_B: torch.Tensor, kv_BHK: KeysValues) -> None:
        """One token of each of B sequences."""
        ...

    def write_span(self, layer: int, slot: int, start: int, kv_THK: KeysValues) -> None:
        """Tokens from position `start` on of one sequence."""
        ...

    def read(self, layer: int, slot: int, length: int) -> KeysValues:
        """The first `length` tokens; to be used before the next write."""
        ...


def attend(qkv: QKV, layout: StepLayout, cache: ReadableCache, layer: int) -> torch.Tensor:
    """(T, H, K). The rows' keys and values are written to `cache`."""
    out_THK = torch.empty_like(qkv.q_THK)
    if layout.rows:
        _attend_rows(qkv, out_THK, layout, cache, layer)
    for span in layout.spans:
        _attend_span(qkv, out_THK, span, cache, layer)
    if layout.padding:
        out_THK[len(out_THK) - layout.padding :] = 0
    return out_THK


def _attend_rows(qkv: QKV, out_THK: torch.Tensor, layout: StepLayout, cache: ReadableCache, layer: int) -> None:
    """One new token of each of B sequences, each over its own keys: nothing is padded, nothing of the cache is copied."""
    num = len(layout.rows)
    cache.write_rows(layer, layout.slots_B, layout.places_B, KeysValues(qkv.k_THK[:num], qkv.v_THK[:num]))
    q_BH1K = qkv.q_THK[:num].unsqueeze(2)
    for index, (slot, length) in enumerate(layout.rows):
        keys_HCK, values_HCK = cache.read(layer, slot, length)
        out_1H1K = F.scaled_dot_product_attention(q_BH1K[index : index + 1], keys_HCK[None], values_HCK[None])
        out_THK[index] = out_1H1K.view(out_THK.shape[1:])


def _attend_span(qkv: QKV, out_THK: torch.Tensor, span: Span, cache: ReadableCache, layer: int) -> None:
    rows = slice(span.start, span.end)
    cache.write_span(layer, span.member.slot, span.position, KeysValues(qkv.k_THK[rows], qkv.v_THK[rows]))
    kv_HCK = cache.read(layer, span.member.slot, span.position + span.end - span.start)
    out_THK[rows] = attend_chunk(qkv.q_THK[rows], kv_HCK)


def attend_chunk(q_THK: torch.Tensor, kv_HCK: KeysValues) -> torch.Tensor:
    """(T, H, K). The last T of C tokens, each over itself and all before it; in which order those are does not matter."""
    num, total = len(q_THK), kv_HCK.keys_HCK.shape[1]
    q_1HTK = q_THK.transpose(0, 1)[None]
    if num == total:
        out_1HTK = F.scaled_dot_product_attention(q_1HTK, kv_HCK.keys_HCK[None], kv_HCK.values_HCK[None], is_causal=True)
    else:
        mask_TC = torch.ones(num, total, dtype=torch.bool, device=q_THK.device).tril(total - num)
        out_1HTK = F.scaled_dot_product_attention(q_1HTK, kv_HCK.keys_HCK[None], kv_HCK.values_HCK[None], attn_mask=mask_TC)
    return out_1HTK[0].transpose(0, 1)
