"""From an architecture's name to the code that computes it."""

from __future__ import annotations

from pathlib import Path

import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.checkpoint import read_config
from asyncpipe_workers.models.opt import OPTConfig, OPTStage

FAMILIES = {"OPTForCausalLM": (OPTConfig, OPTStage)}


def load_stage(path: Path, *, first: int, last: int, dtype: torch.dtype, device: torch.device) -> OPTStage:
    """Raises Invalid for an architecture that is not supported, and for a checkpoint that cannot be read."""
    config = read_config(path)
    for name in config.get("architectures") or ():
        if name in FAMILIES:
            config_type, stage_type = FAMILIES[name]
            return stage_type(path, config_type.from_json(config), first=first, last=last, dtype=dtype, device=device)
    raise Invalid(f"{path}: {config.get('architectures')} is not supported; supported: {', '.join(FAMILIES)}")
