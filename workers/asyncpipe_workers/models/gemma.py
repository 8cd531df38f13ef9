"""Gemma 2 (Riviere et al. 2024) and the text part of Gemma 3 (Kamath et al. 2025).

Norms before and after each part, with weights counted from one; scaled embeddings; layers that see a window of tokens between
those that see all. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and has other rotary positions in windows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from asyncpipe_workers.models import decoder
from asyncpipe_workers.models.decoder import DecoderConfig, Residual, SelfAttention, sliding_windows
from asyncpipe_workers.models.layers import logits
from asyncpipe_workers.models.rope import make_rope, rope_parameters
from asyncpipe_workers.models.units import Blocks
from asyncpipe_workers.models.weights import Projection, Weights

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0  # of Gemma 3, unless its configuration says otherwise


def gemma2_config(fields: Mapping[str, Any], **own: Any) -> DecoderConfig:
    types = layer_types(fields, pattern=2)
    has_bias = bool(fields.get("attention_bias", False))
    return DecoderConfig.from_fields(
        fields,
        windows=sliding_windows(fields, [each == "sliding_attention" for each in types]),
        norm_offset=1.0,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        score_scale=fields["query_pre_attn_scalar"] ** -0.5,
        score_softcap=fields.get("attn_logit_softcapping"),
        logit_softcap=fields.get("final_logit_softcapping"),
        **own,
    )


def gemma3_config(fields: Mapping[str, Any]) -> DecoderConfig:
    pattern = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or 6
    types = layer_types(fields, pattern=pattern)
    ropes = {kind: make_rope(_rope_parameters(fields, kind), fields, fields["head_dim"]) for kind in set(types)}
    fields = {**fields, "layer_types": types}
    return gemma2_config(fields, ropes=tuple(ropes[kind] for kind in types), has_head_norms=True)


def layer_types(fields: Mapping[str, Any], *, pattern: int) -> Sequence[str]:
    """Each `pattern`th layer sees all tokens."""
    num_layers = fields["num_hidden_layers"]
    given: Sequence[str] | None = fields.get("layer_types")
    return given or ["sliding_attention" if (n + 1) % pattern else "full_attention" for n in range(num_layers)]


def _rope_parameters(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    given = fields.get("rope_parameters") or {}
    if kind in given:
        return dict(given[kind])
    if kind == "sliding_attention":
        return {"rope_theta": fields.get("rope_local_base_freq", LOCAL_THETA)}
    return {"rope_theta": GLOBAL_THETA, **rope_parameters(fields)}


class Embedding(decoder.Embedding):
    def __init__(self, weights: Weights, config: DecoderConfig) -> None:
        super().__init__(weights, config)
        self._size = config.hidden_size

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        hidden_TD = super().__call__(token_ids_T, positions_T)
        return hidden_TD * _scale(self._size, hidden_TD.dtype)


@functools.cache
def _scale(hidden_size: int, dtype: torch.dtype) -> float:
    """Rounded as hidden states are."""
    return torch.tensor(math.sqrt(hidden_size), dtype=dtype).item()


def _attention(weights: Weights, config: DecoderConfig, index: int, cache_layer: int) -> Residual:
    part, name = SelfAttention(weights, config, index, cache_layer), f"layers.{index}"
    return Residual(
        part, config.norm(weights, f"{name}.input_layernorm"), config.norm(weights, f"{name}.post_attention_layernorm")
    )


def _feed_forward(weights: Weights, config: DecoderConfig, index: int) -> Residual:
    part, name = decoder.dense_part(weights, config, index), f"layers.{index}"
    return Residual(
        part,
        config.norm(weights, f"{name}.pre_feedforward_layernorm"),
        config.norm(weights, f"{name}.post_feedforward_layernorm"),
    )


def _logits(weights: Weights, config: DecoderConfig, first: int, last: int) -> Projection:
    project, softcap = logits(weights, config, first, last), config.logit_softcap
    return project if softcap is None else lambda x_RD: project(x_RD).div_(softcap).tanh_().mul_(softcap)


def gemma_blocks(config: DecoderConfig) -> Blocks:
    return decoder.decoder_blocks(config, embedding=Embedding, attention=_attention, feed_forward=_feed_forward, logits=_logits)
