"""Qwen 2 and 2.5 (Yang et al. 2024), whose queries, keys and values have biases, and Qwen 3 (Yang et al. 2025), whose heads'
queries and keys are normed instead. Later layers may see no more than a window of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncpipe_workers.models.decoder import DecoderConfig, sliding_windows


def qwen2_config(fields: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig.from_fields(fields, windows=_windows(fields), has_qkv_bias=True)


def qwen3_config(fields: Mapping[str, Any]) -> DecoderConfig:
    has_bias = bool(fields.get("attention_bias", False))
    return DecoderConfig.from_fields(
        fields, windows=_windows(fields), has_head_norms=True, has_qkv_bias=has_bias, has_out_bias=has_bias
    )


def _windows(fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    num_layers: int = fields["num_hidden_layers"]
    if not fields.get("use_sliding_window", False):
        return (None,) * num_layers
    first = fields.get("max_window_layers", 28)
    types: Sequence[str] = fields.get("layer_types") or [
        "sliding_attention" if n >= first else "full_attention" for n in range(num_layers)
    ]
    return sliding_windows(fields, [each == "sliding_attention" for each in types])
