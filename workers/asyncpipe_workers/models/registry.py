"""From an architecture's name to the code that computes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from asyncpipe.errors import Invalid
from asyncpipe.model_shape import model_fields
from asyncpipe_workers.models.decoder import decoder_blocks
from asyncpipe_workers.models.gemma import gemma2_config, gemma3_config, gemma_blocks
from asyncpipe_workers.models.gpt2 import GPT2Config, gpt2_blocks
from asyncpipe_workers.models.hugging_face import HuggingFaceConfig, hugging_face_units
from asyncpipe_workers.models.llama import llama_config
from asyncpipe_workers.models.mistral import mistral_config
from asyncpipe_workers.models.moe import mixtral_config, moe_blocks, qwen3_moe_config
from asyncpipe_workers.models.opt import OPTConfig, opt_blocks
from asyncpipe_workers.models.phi3 import phi3_config
from asyncpipe_workers.models.qwen import qwen2_config, qwen3_config
from asyncpipe_workers.models.units import Blocks, StageUnits, stage_units


class ModelConfig(Protocol):
    """What a stage needs to know of any family's configuration."""

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_size(self) -> int: ...

    @property
    def has_plain_attention(self) -> bool:
        """Every token sees all before it, by nothing but the softmax of scaled products."""
        ...


class Units(Protocol):
    def __call__(self, config: Any, *, first: int, last: int, separate: bool, logits_rows: int | None) -> StageUnits: ...


class Model(NamedTuple):
    """What a stage is made of. Only where it `can_stream` may its weights be anywhere; only where it `is_static` is it tried to
    capture a step and replay it."""

    config: ModelConfig
    units: Units
    can_stream: bool = True
    is_static: bool = True  # whether the shapes that it computes with may depend on nothing but a step's


class Family(NamedTuple):
    """`config` reads a config.json's `model_fields`; `blocks` are what a stage of such a configuration is built with."""

    config: Callable[[dict[str, Any]], ModelConfig]
    blocks: Callable[..., Blocks] = decoder_blocks
    is_static: bool = True

    def units(self, config: ModelConfig, **bounds: Any) -> StageUnits:
        """`bounds` are `stage_units`'s first, last, separate and logits_rows."""
        return stage_units(self.blocks(config), num_layers=config.num_layers, vocab_size=config.vocab_size, **bounds)


FAMILIES = {
    "OPTForCausalLM": Family(OPTConfig.from_json, opt_blocks),
    "GPT2LMHeadModel": Family(GPT2Config.from_json, gpt2_blocks),
    "LlamaForCausalLM": Family(llama_config),
    "MistralForCausalLM": Family(mistral_config),
    "Qwen2ForCausalLM": Family(qwen2_config),
    "Qwen3ForCausalLM": Family(qwen3_config),
    "Phi3ForCausalLM": Family(phi3_config),
    "Gemma2ForCausalLM": Family(gemma2_config, gemma_blocks),
    "Gemma3ForCausalLM": Family(gemma3_config, gemma_blocks),
    "Gemma3ForConditionalGeneration": Family(gemma3_config, gemma_blocks),
    "MixtralForCausalLM": Family(mixtral_config, moe_blocks, is_static=False),
    "Qwen3MoeForCausalLM": Family(qwen3_moe_config, moe_blocks, is_static=False),
}


def find_model(config_json: str, impl: str = "auto") -> Model:
    """`impl` is native for our code, transformers for its, auto for ours where there is any. Raises Invalid for an
    architecture that is not supported, and for a configuration that cannot be."""
    try:
        fields = model_fields(json.loads(config_json))
    except ValueError as error:
        raise Invalid(f"the model's configuration is not JSON: {error}") from None
    name = next((name for name in fields.get("architectures") or () if name in FAMILIES), None)
    if impl == "transformers" or (impl == "auto" and name is None):
        try:
            return Model(HuggingFaceConfig.of(fields), hugging_face_units, can_stream=False)
        except Invalid as error:
            raise Invalid(f"{error}; supported: {', '.join(FAMILIES)}, and decoders with such a plan") from None
    if name is None:
        raise Invalid(f"{fields.get('architectures')} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    try:
        config = family.config(fields)
    except KeyError as missing:
        raise Invalid(f"config.json lacks {missing}") from None
    has_fixed_ropes = all(rope.long_F is None for rope in getattr(config, "ropes", ()))
    return Model(config, family.units, is_static=family.is_static and has_fixed_ropes)
