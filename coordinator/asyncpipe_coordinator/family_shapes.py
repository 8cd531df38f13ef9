"""What each family calls its tensors, and their shapes: those outside of the decoder layers, and those of a layer.

Names are plain ones, without "model." and its like; a layer's are without what is the same for all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncpipe.model_shape import ModelShape, is_sparse, num_experts

Shapes = dict[str, tuple[int, ...]]
Fields = Mapping[str, Any]

OPT_POSITION_OFFSET = 2  # OPT's learned positions start at row 2

# --- OPT ---


def opt_outer(fields: Fields, shape: ModelShape) -> Shapes:
    vocab, hidden = shape.vocab_size, shape.hidden_size
    embedding = fields.get("word_embed_proj_dim", hidden)
    shapes: Shapes = {
        "decoder.embed_tokens.weight": (vocab, embedding),
        "decoder.embed_positions.weight": (shape.max_context_len + OPT_POSITION_OFFSET, hidden),
    }
    if embedding != hidden:
        shapes["decoder.project_in.weight"] = (hidden, embedding)
        shapes["decoder.project_out.weight"] = (embedding, hidden)
    if fields.get("do_layer_norm_before", True) and not fields.get("_remove_final_layer_norm", False):
        shapes |= _opt_norm(fields, shape, "decoder.final_layer_norm")
    if not fields.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocab, embedding)
    return shapes


def opt_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    hidden, ffn = shape.hidden_size, shape.ffn_size
    matrices: Shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    matrices |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    shapes = _linears(matrices, has_bias=fields.get("enable_bias", True))
    return shapes | _opt_norm(fields, shape, "self_attn_layer_norm") | _opt_norm(fields, shape, "final_layer_norm")


def _opt_norm(fields: Fields, shape: ModelShape, name: str) -> Shapes:
    return _norms(shape, name, has_bias=True) if fields.get("layer_norm_elementwise_affine", True) else {}


# --- GPT-2 ---


def gpt2_outer(fields: Fields, shape: ModelShape) -> Shapes:
    table = (shape.vocab_size, shape.hidden_size)
    shapes: Shapes = {"wte.weight": table, "wpe.weight": (shape.max_context_len, shape.hidden_size)}
    return shapes | _norms(shape, "ln_f", has_bias=True) | ({} if shape.has_tied_head else {"lm_head.weight": table})


def gpt2_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    """Matrices are (in, out)."""
    hidden, ffn = shape.hidden_size, shape.ffn_size
    matrices: Shapes = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
    matrices |= {"mlp.c_fc": (hidden, ffn), "mlp.c_proj": (ffn, hidden)}
    shapes: Shapes = {f"{name}.weight": size for name, size in matrices.items()}
    shapes |= {f"{name}.bias": size[1:] for name, size in matrices.items()}
    return shapes | _norms(shape, "ln_1", "ln_2", has_bias=True)


# --- Llama and its like ---


def decoder_outer(fields: Fields, shape: ModelShape) -> Shapes:
    table = (shape.vocab_size, shape.hidden_size)
    shapes: Shapes = {"embed_tokens.weight": table} | _norms(shape, "norm")
    return shapes | ({} if shape.has_tied_head else {"lm_head.weight": table})


def llama_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    has_bias = bool(fields.get("attention_bias", False))
    matrices = _linears(_gated("mlp", shape, shape.ffn_size), has_bias=bool(fields.get("mlp_bias", False)))
    return _attention(shape, has_qkv_bias=has_bias, has_out_bias=has_bias) | matrices | _two_norms(shape)


def mistral_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    return _attention(shape) | _linears(_gated("mlp", shape, shape.ffn_size)) | _two_norms(shape)


def qwen2_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    return mistral_layer(fields, shape, layer) | _attention(shape, has_qkv_bias=True)


def qwen3_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    return llama_layer(fields, shape, layer) | _head_norms(shape)


def phi3_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    hidden, ffn, size = shape.hidden_size, shape.ffn_size, shape.head_size
    matrices: Shapes = {
        "self_attn.qkv_proj": ((shape.num_heads + 2 * shape.num_kv_heads) * size, hidden),
        "self_attn.o_proj": (hidden, shape.num_heads * size),
        "mlp.gate_up_proj": (2 * ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return _linears(matrices) | _two_norms(shape)


def gemma2_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    norms = _norms(shape, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    return llama_layer({**fields, "mlp_bias": False}, shape, layer) | norms


def gemma3_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    return gemma2_layer(fields, shape, layer) | _head_norms(shape)


def mixtral_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    experts: Shapes = {"block_sparse_moe.gate": (num_experts(fields), shape.hidden_size)}
    for expert in range(num_experts(fields)):
        experts |= _gated(f"block_sparse_moe.experts.{expert}", shape, shape.ffn_size, names=("w1", "w3", "w2"))
    return _attention(shape) | _linears(experts) | _two_norms(shape)


def qwen3_moe_layer(fields: Fields, shape: ModelShape, layer: int) -> Shapes:
    if not is_sparse(fields, layer):
        return qwen3_layer(fields, shape, layer)
    has_bias = bool(fields.get("attention_bias", False))
    experts: Shapes = {"mlp.gate": (num_experts(fields), shape.hidden_size)}
    for expert in range(num_experts(fields)):
        experts |= _gated(f"mlp.experts.{expert}", shape, int(fields["moe_intermediate_size"]))
    attention = _attention(shape, has_qkv_bias=has_bias, has_out_bias=has_bias) | _head_norms(shape)
    return attention | _linears(experts) | _two_norms(shape)


# --- parts ---


def _attention(shape: ModelShape, *, has_qkv_bias: bool = False, has_out_bias: bool = False) -> Shapes:
    hidden, size, kv_size = shape.hidden_size, shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    qkv: Shapes = {f"self_attn.{name}_proj": (rows, hidden) for name, rows in (("q", size), ("k", kv_size), ("v", kv_size))}
    return _linears(qkv, has_bias=has_qkv_bias) | _linears({"self_attn.o_proj": (hidden, size)}, has_bias=has_out_bias)


def _gated(
    prefix: str, shape: ModelShape, size: int, *, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return {gate: (size, shape.hidden_size), up: (size, shape.hidden_size), down: (shape.hidden_size, size)}


def _linears(matrices: Shapes, *, has_bias: bool = False) -> Shapes:
    biases: Shapes = {f"{name}.bias": size[:1] for name, size in matrices.items()} if has_bias else {}
    return {f"{name}.weight": size for name, size in matrices.items()} | biases


def _norms(shape: ModelShape, *names: str, has_bias: bool = False) -> Shapes:
    return {f"{name}.{part}": (shape.hidden_size,) for name in names for part in ("weight", "bias")[: 1 + has_bias]}


def _two_norms(shape: ModelShape) -> Shapes:
    return _norms(shape, "input_layernorm", "post_attention_layernorm")


def _head_norms(shape: ModelShape) -> Shapes:
    return {f"self_attn.{name}_norm.weight": (shape.head_size,) for name in "qk"}
