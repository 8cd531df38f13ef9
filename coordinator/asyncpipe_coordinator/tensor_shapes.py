"""Which tensors a checkpoint must hold, with their shapes, by its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asyncpipe.errors import Invalid

Shapes = dict[str, tuple[int, ...]]

SUPPORTED = ("OPTForCausalLM",)
OPT_POSITION_OFFSET = 2  # OPT's learned positions start at row 2

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "max_position_embeddings")


def expected_shapes(path: Path, config: dict[str, Any]) -> Shapes:
    """Names as under OPT's `model.`: "decoder.layers.0.fc1.weight". Raises Invalid for a configuration that cannot be."""
    for name in _SIZES:
        if not isinstance(config.get(name), int) or not 0 < config[name] < 2**31:
            raise Invalid(f"{path / 'config.json'}: {name} is {config.get(name)!r}; it must be a positive number")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        raise Invalid(f"{path / 'config.json'}: hidden_size {hidden} cannot be divided among {heads} heads")
    shapes = _outer_shapes(config)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in _layer_shapes(config).items()}
    return shapes


def _outer_shapes(config: dict[str, Any]) -> Shapes:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    embedding = config.get("word_embed_proj_dim", hidden)
    positions = config["max_position_embeddings"] + OPT_POSITION_OFFSET
    shapes: Shapes = {
        "decoder.embed_tokens.weight": (vocab, embedding),
        "decoder.embed_positions.weight": (positions, hidden),
    }
    if embedding != hidden:
        shapes["decoder.project_in.weight"] = (hidden, embedding)
        shapes["decoder.project_out.weight"] = (embedding, hidden)
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        shapes |= _norm_shapes(config, "decoder.final_layer_norm")
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocab, embedding)
    return shapes


def _layer_shapes(config: dict[str, Any]) -> Shapes:
    hidden, ffn = config["hidden_size"], config["ffn_dim"]
    matrices = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    matrices |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    shapes: Shapes = {f"{name}.weight": shape for name, shape in matrices.items()}
    if config.get("enable_bias", True):
        shapes |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    return shapes | _norm_shapes(config, "self_attn_layer_norm") | _norm_shapes(config, "final_layer_norm")


def _norm_shapes(config: dict[str, Any], name: str) -> Shapes:
    if not config.get("layer_norm_elementwise_affine", True):
        return {}
    hidden = config["hidden_size"]
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
