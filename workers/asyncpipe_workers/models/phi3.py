"""Phi-3 and Phi-4 (Abdin et al. 2024): one matrix for queries, keys and values, one for gate and up; LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncpipe_workers.models.decoder import DecoderConfig
from asyncpipe_workers.models.mistral import mistral_config
from asyncpipe_workers.models.rope import rope_parameters


def phi3_config(fields: Mapping[str, Any]) -> DecoderConfig:
    parameters = rope_parameters(fields)
    if (parameters.get("rope_type") or parameters.get("type")) in ("su", "yarn"):  # earlier names of it
        parameters["rope_type"] = "longrope"
    return mistral_config(fields, rope=parameters, has_fused_matrices=True)
