"""Arithmetic that decoder families share.

Shapes: T rows of a step, B continuing sequences, C cached tokens, D hidden, H heads, K head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from asyncpipe_workers.batch import Span, StepLayout
from asyncpipe_workers.memory.kv import KeysValues, KVCache

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""By the names that Hugging Face configurations use."""


@dataclass(frozen=True, slots=True)
class Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    size: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias)


class QKV(NamedTuple):
    """Each (T, H, K)."""

    q_THK: torch.Tensor
    k_THK: torch.Tensor
    v_THK: torch.Tensor


def attend(qkv: QKV, layout: StepLayout, cache: KVCache, layer: int) -> torch.Tensor:
    """Causal attention of a step's rows, (T, H, K); their keys and values are written to `cache`."""
    out_THK = torch.empty_like(qkv.q_THK)
    if layout.rows:
        _attend_rows(qkv, out_THK, layout, cache, layer)
    for span in layout.spans:
        _attend_span(qkv, out_THK, span, cache, layer)
    if layout.padding:
        out_THK[len(out_THK) - layout.padding :] = 0
    return out_THK


def _attend_rows(qkv: QKV, out_THK: torch.Tensor, layout: StepLayout, cache: KVCache, layer: int) -> None:
    """One new token of each of B sequences, each over its own keys: nothing is padded, nothing of the cache is copied."""
    num = len(layout.rows)
    cache.write_rows(layer, layout.slots_B, layout.places_B, KeysValues(qkv.k_THK[:num], qkv.v_THK[:num]))
    q_BH1K = qkv.q_THK[:num].unsqueeze(2)
    for index, (slot, length) in enumerate(layout.rows):
        keys_HCK, values_HCK = cache.read(layer, slot, length)
        out_1H1K = F.scaled_dot_product_attention(q_BH1K[index : index + 1], keys_HCK[None], values_HCK[None])
        out_THK[index] = out_1H1K.view(out_THK.shape[1:])


def _attend_span(qkv: QKV, out_THK: torch.Tensor, span: Span, cache: KVCache, layer: int) -> None:
    """A chunk of a prompt, over what came before it and itself."""
    rows = slice(span.start, span.end)
    end = span.position + span.end - span.start
    cache.write_span(layer, span.member.slot, span.position, KeysValues(qkv.k_THK[rows], qkv.v_THK[rows]))
    keys_HCK, values_HCK = cache.read(layer, span.member.slot, end)
    q_1HTK = qkv.q_THK[rows].transpose(0, 1)[None]
    if span.position == 0:
        out_1HTK = F.scaled_dot_product_attention(q_1HTK, keys_HCK[None], values_HCK[None], is_causal=True)
    else:
        mask_TC = torch.ones(end - span.position, end, dtype=torch.bool, device=q_1HTK.device).tril(span.position)
        out_1HTK = F.scaled_dot_product_attention(q_1HTK, keys_HCK[None], values_HCK[None], attn_mask=mask_TC)
    out_THK[rows] = out_1HTK[0].transpose(0, 1)
