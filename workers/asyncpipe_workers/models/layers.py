"""Arithmetic that decoder families share. Shapes: T rows of a step, B continuing sequences, D hidden, H heads, K head size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from asyncpipe_workers.batch import StepLayout
from asyncpipe_workers.memory.kv import KVCache

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
    if layout.num_continuing:
        out_THK[: layout.num_continuing] = _attend_continuing(qkv, layout, cache, layer)
    for span in layout.prompts:
        q_1HTK, k_1HTK, v_1HTK = (x[span.start : span.end].transpose(0, 1).unsqueeze(0) for x in qkv)
        length = span.end - span.start
        cache.keys_SHCK[layer][span.slot, :, :length] = k_1HTK[0]
        cache.values_SHCK[layer][span.slot, :, :length] = v_1HTK[0]
        out_1HTK = F.scaled_dot_product_attention(q_1HTK, k_1HTK, v_1HTK, is_causal=True)
        out_THK[span.start : span.end] = out_1HTK[0].transpose(0, 1)
    return out_THK


def _attend_continuing(qkv: QKV, layout: StepLayout, cache: KVCache, layer: int) -> torch.Tensor:
    """One new token of each of B sequences, over the cached ones, all in one call; (B, H, K)."""
    num = layout.num_continuing
    q_BHK, k_BHK, v_BHK = (x[:num] for x in qkv)
    keys_SHCK, values_SHCK = cache.keys_SHCK[layer], cache.values_SHCK[layer]
    keys_SHCK[layout.slots_B, :, layout.lengths_B] = k_BHK
    values_SHCK[layout.slots_B, :, layout.lengths_B] = v_BHK
    if layout.row_of_slot is not None:
        q_BHK = q_BHK[layout.row_of_slot]
    out_BH1K = F.scaled_dot_product_attention(
        q_BHK.unsqueeze(2),
        keys_SHCK[:num, :, : layout.longest],
        values_SHCK[:num, :, : layout.longest],
        attn_mask=layout.mask_B11C,
    )
    out_BHK = out_BH1K.squeeze(2)
    return out_BHK if layout.row_of_slot is None else out_BHK[layout.slots_B]
