"""Llama 2 (Touvron et al. 2023) and Llama 3 (Grattafiori et al. 2024): the plain decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncpipe_workers.models.decoder import DecoderConfig


def llama_config(fields: Mapping[str, Any]) -> DecoderConfig:
    has_bias = bool(fields.get("attention_bias", False))
    has_ffn_bias = bool(fields.get("mlp_bias", False))
    return DecoderConfig.from_fields(fields, has_qkv_bias=has_bias, has_out_bias=has_bias, has_ffn_bias=has_ffn_bias)
