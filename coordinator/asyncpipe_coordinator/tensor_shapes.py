"""Which tensors a checkpoint must hold, with their shapes, by its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from asyncpipe.errors import Invalid
from asyncpipe.model_shape import ModelShape, model_fields
from asyncpipe_coordinator import family_shapes as family
from asyncpipe_coordinator.family_shapes import Fields, Shapes

__all__ = ["SUPPORTED", "Shapes", "expected_shapes", "find_architecture", "model_shape"]


class _Family(NamedTuple):
    """`layer` is asked for each layer, whose names begin with `prefix` and its number."""

    layer: Callable[[Fields, ModelShape, int], Shapes]
    outer: Callable[[Fields, ModelShape], Shapes] = family.decoder_outer
    prefix: str = "layers"


_FAMILIES: Mapping[str, _Family] = {
    "OPTForCausalLM": _Family(family.opt_layer, family.opt_outer, "decoder.layers"),
    "GPT2LMHeadModel": _Family(family.gpt2_layer, family.gpt2_outer, "h"),
    "LlamaForCausalLM": _Family(family.llama_layer),
    "MistralForCausalLM": _Family(family.mistral_layer),
    "Qwen2ForCausalLM": _Family(family.qwen2_layer),
    "Qwen3ForCausalLM": _Family(family.qwen3_layer),
    "Phi3ForCausalLM": _Family(family.phi3_layer),
    "Gemma2ForCausalLM": _Family(family.gemma2_layer),
    "Gemma3ForCausalLM": _Family(family.gemma3_layer),
    "Gemma3ForConditionalGeneration": _Family(family.gemma3_layer),
    "MixtralForCausalLM": _Family(family.mixtral_layer),
    "Qwen3MoeForCausalLM": _Family(family.qwen3_moe_layer),
}
SUPPORTED = tuple(_FAMILIES)


def find_architecture(path: Path, config: Mapping[str, Any], *, native: bool = False) -> str:
    """Unless it must be `native`, any will do: workers know which ones transformers can run. Raises Invalid for one that is not
    supported, and for quantized weights."""
    names = config.get("architectures") or []
    found = next((str(name) for name in names if name in _FAMILIES), None)
    if found is None and names and not native:
        found = str(names[0])
    if found is None:
        described = ", ".join(map(str, names)) or f"model_type {config.get('model_type')!r}"
        raise Invalid(f"{path}: {described} is not supported; supported: {', '.join(SUPPORTED)}")
    quantization = model_fields(config).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise Invalid(
            f"{path} is quantized with {method or 'an unknown method'}, which is not supported yet; use the original"
            " checkpoint, or convert --compress-weight"
        )
    return found


def model_shape(path: Path, config: Mapping[str, Any]) -> ModelShape:
    """Raises Invalid for a configuration that cannot be."""
    return ModelShape.from_fields(model_fields(config), where=str(path / "config.json"))


def expected_shapes(path: Path, config: Mapping[str, Any]) -> Shapes:
    """By plain names: "decoder.layers.0.fc1.weight" of an OPT. None are known of a family that is not native.

    Raises Invalid for a configuration that cannot be.
    """
    fields, shape = model_fields(config), model_shape(path, config)
    found = _FAMILIES.get(find_architecture(path, config))
    if found is None:
        return {}
    shapes = found.outer(fields, shape)
    for layer in range(shape.num_layers):
        shapes |= {f"{found.prefix}.{layer}.{name}": size for name, size in found.layer(fields, shape, layer).items()}
    return shapes
