"""From an architecture's name to the code that computes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.models.opt import OPTConfig, OPTStage

FAMILIES = {"OPTForCausalLM": (OPTConfig, OPTStage)}


def load_stage(path: Path, config_json: str, *, first: int, last: int, dtype: torch.dtype, device: torch.device) -> OPTStage:
    """Raises Invalid for an architecture that is not supported, and for a checkpoint that cannot be read."""
    try:
        config = json.loads(config_json)
    except ValueError as error:
        raise Invalid(f"the model's configuration is not JSON: {error}") from None
    for name in config.get("architectures") or ():
        if name in FAMILIES:
            config_type, stage_type = FAMILIES[name]
            return stage_type(path, config_type.from_json(config), first=first, last=last, dtype=dtype, device=device)
    raise Invalid(f"{path}: {config.get('architectures')} is not supported; supported: {', '.join(FAMILIES)}")
