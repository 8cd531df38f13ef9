"""Mistral (Jiang et al. 2023, "Mistral 7B"): each layer may see no more than a window of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncpipe_workers.models.decoder import DecoderConfig, sliding_windows


def mistral_config(fields: Mapping[str, Any], **own: Any) -> DecoderConfig:
    return DecoderConfig.from_fields(fields, windows=sliding_windows(fields, [True] * fields["num_hidden_layers"]), **own)
