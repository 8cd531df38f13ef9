"""How many bytes a stage's parts take, by its model's shapes and its policy. Pure.

* Weights: of the stage's decoder layers, of the embedding on the first stage, of the head on the last; what both share is
  there once. Those that stay on the device are in the dtype to compute in; streamed ones rest as the checkpoint has them.
  Compressed matrices take half a byte for each number, and four for each group; embeddings are not compressed.
* Keys and values: of all micro-batches' blocks, MEAN_TOKENS for each sequence (or the whole context, where that is shorter),
  and never less than one sequence of the whole context.
* Activations: the hidden states of a full step of each micro-batch, before and after a layer.
* Working memory is what cannot be elsewhere than on the device:
  - what computing a full step needs: queries, keys, values, the feed-forward part, and on the last stage the logits;
  - when weights are streamed, or compressed, room for the largest *unit* (a layer's attention or feed-forward part, or the
    whole layer without `sep_layer`; the head's table is cut into parts no larger) as it is stored, and as numbers where those
    differ; with `overlap`, for three of them: one is computed while others come;
  - when keys and values are streamed or compressed, room for those of two batches of `gpu_batch_size` in one layer.

What a framework takes for itself (a CUDA context, an allocator's gaps) is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from asyncpipe.policy import Policy, is_compressible
from asyncpipe_coordinator.core.partition import LayerRange
from asyncpipe_coordinator.tensor_shapes import Shapes

MEAN_TOKENS = 1024
UNITS_AHEAD = 3
ALIGNMENT_BYTES = 2 * 4096 + 64  # of each tensor in a buffer: it is read from a disk's block to another, and aligned

EMBEDDING = ("decoder.embed_tokens.weight", "decoder.embed_positions.weight", "decoder.project_in.weight")
HEAD = ("decoder.project_out.weight", "decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDemand:
    """Bytes, as the module's docstring defines them. `rounding` is what whole rows may add to a share."""

    weights: int  # as they rest when some of them are streamed
    resident_weights: int  # when all of them stay on the device
    cache: int
    activations: int
    compute: int
    weight_buffers: int  # when weights are streamed or compressed
    cache_workspace: int  # when keys and values are streamed or compressed
    rounding: int


def stage_demand(
    *,
    shapes: Shapes,
    config: dict[str, Any],
    layers: LayerRange,
    dtype_bytes: int,
    stored_dtype_bytes: int,
    policy: Policy,
    num_micro_batches: int,
    step_tokens: int,
    kv_block_tokens: int,
    kv_bytes: int | None = None,
) -> StageDemand:
    """`shapes` and `config` are the whole model's, `layers` the stage's. Numbers are computed with in `dtype_bytes` each, and
    are in `stored_dtype_bytes` in the checkpoint. `kv_bytes` is a wish that replaces the rule above."""
    own = _stage_shapes(shapes, config, layers)
    hidden, context = config["hidden_size"], config["max_position_embeddings"]
    tokens = min(context, MEAN_TOKENS)
    most_tokens = max(policy.block_size * num_micro_batches * rounded_up(tokens, kv_block_tokens), context)
    layer_cache = rounded_up(most_tokens, kv_block_tokens) * kv_token_bytes(config, dtype_bytes, policy)
    return StageDemand(
        weights=sum(_stored(name, shape, stored_dtype_bytes, policy) for name, shape in own.items()),
        resident_weights=sum(_stored(name, shape, dtype_bytes, policy) for name, shape in own.items()),
        cache=kv_bytes or (layers.last - layers.first) * layer_cache,
        activations=2 * num_micro_batches * step_tokens * hidden * dtype_bytes,
        compute=_compute_bytes(config, layers, dtype_bytes, policy, step_tokens=step_tokens),
        weight_buffers=_weight_buffers(own, layers, dtype_bytes, stored_dtype_bytes, policy),
        cache_workspace=2 * policy.gpu_batch_size * tokens * 2 * hidden * dtype_bytes,
        rounding=max(math.prod(shape[1:]) for shape in own.values()) * max(dtype_bytes, stored_dtype_bytes),
    )


def _stage_shapes(shapes: Shapes, config: dict[str, Any], layers: LayerRange) -> Shapes:
    prefixes = tuple(f"decoder.layers.{layer}." for layer in range(*layers))
    names = [name for name in shapes if name.startswith(prefixes)]
    if layers.first == 0:
        names += EMBEDDING
    if layers.last == config["num_hidden_layers"]:
        names += [*HEAD, "lm_head.weight" if "lm_head.weight" in shapes else EMBEDDING[0]]
    return {name: shapes[name] for name in names if name in shapes}


def _stored(name: str, shape: tuple[int, ...], dtype_bytes: int, policy: Policy) -> int:
    if not policy.compress_weight or not is_compressible(name, shape):
        return math.prod(shape) * dtype_bytes
    return shape[0] * policy.comp_weight_config.packed_bytes(shape[1])


def kv_token_bytes(config: dict[str, Any], dtype_bytes: int, policy: Policy) -> int:
    """Of one token in one layer."""
    heads: int = config["num_attention_heads"]
    head_size: int = config["hidden_size"] // heads
    if policy.compress_cache:
        return 2 * heads * policy.comp_cache_config.packed_bytes(head_size)
    return 2 * heads * head_size * dtype_bytes


def _compute_bytes(config: dict[str, Any], layers: LayerRange, dtype_bytes: int, policy: Policy, *, step_tokens: int) -> int:
    rows: int = step_tokens * (4 * config["hidden_size"] + config["ffn_dim"]) * dtype_bytes
    logits: int = 2 * policy.block_size * config["vocab_size"] * 4  # in float32, and their probabilities
    return rows + (logits if layers.last == config["num_hidden_layers"] else 0)


def _weight_buffers(own: Shapes, layers: LayerRange, dtype_bytes: int, stored_dtype_bytes: int, policy: Policy) -> int:
    """Of the first layer's units; all layers are alike."""
    units: dict[str, int] = {}
    for name, shape in own.items():
        if name.startswith(f"decoder.layers.{layers.first}."):
            unit = "attention" if policy.sep_layer and ".self_attn" in name else "layer"
            numbers = math.prod(shape) * dtype_bytes if policy.compress_weight or dtype_bytes != stored_dtype_bytes else 0
            stored = _stored(name, shape, stored_dtype_bytes, policy)
            units[unit] = units.get(unit, 0) + stored + numbers + ALIGNMENT_BYTES
    return (UNITS_AHEAD if policy.overlap else 1) * max(units.values())


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step
