"""From an architecture's name to the code that computes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from asyncpipe.errors import Invalid
from asyncpipe_workers.models.opt import OPTConfig, opt_units
from asyncpipe_workers.models.units import StageUnits


class ModelConfig(Protocol):
    """What a stage needs to know of any family's configuration."""

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_size(self) -> int: ...

    @property
    def has_plain_attention(self) -> bool:
        """Every token sees all before it, by nothing but the softmax of scaled products."""
        ...


class Family(NamedTuple):
    """`config` reads a config.json; `units(config, first=, last=, separate=, logits_rows=)` are the layers of a stage."""

    config: Callable[[dict[str, Any]], ModelConfig]
    units: Callable[..., StageUnits]


FAMILIES = {"OPTForCausalLM": Family(OPTConfig.from_json, opt_units)}


def find_family(config_json: str) -> tuple[Family, ModelConfig]:
    """Raises Invalid for an architecture that is not supported, and for a configuration that cannot be."""
    try:
        fields = json.loads(config_json)
    except ValueError as error:
        raise Invalid(f"the model's configuration is not JSON: {error}") from None
    for name in fields.get("architectures") or ():
        if name in FAMILIES:
            return FAMILIES[name], FAMILIES[name].config(fields)
    raise Invalid(f"{fields.get('architectures')} is not supported; supported: {', '.join(FAMILIES)}")
