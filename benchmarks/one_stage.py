"""The plan of a stage that is a whole model, for benchmarks of nothing but that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peer_cases import KV_BLOCK_TOKENS, THREADS

from asyncpipe.wire.messages import LoadStage


def whole_model(directory: Path, quantize: str | None, **fields: Any) -> LoadStage:
    """Computed in float32; `fields` are those of LoadStage that say how long and how many sequences may be."""
    config_json = (directory / "config.json").read_text()
    return LoadStage(
        epoch=1,
        stage=0,
        num_stages=1,
        first_layer=0,
        last_layer=json.loads(config_json)["num_hidden_layers"],
        checkpoint=str(directory),
        config_json=config_json,
        dtype="float32",
        quantize=quantize,
        num_threads=THREADS,
        kv_block_tokens=KV_BLOCK_TOKENS,
        **fields,
    )
