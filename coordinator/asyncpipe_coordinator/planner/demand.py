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

from asyncpipe.model_shape import ModelShape
from asyncpipe.policy import Policy, is_compressible
from asyncpipe.tensor_names import HEAD, TABLES, layer_name
from asyncpipe_coordinator.core.partition import LayerRange
from asyncpipe_coordinator.tensor_shapes import Shapes

MEAN_TOKENS = 1024
UNITS_AHEAD = 3
ALIGNMENT_BYTES = 2 * 4096 + 64  # of each tensor in a buffer: it is read from a disk's block to another, and aligned

EMBEDDING = (*TABLES, "decoder.embed_positions.weight", "decoder.project_in.weight", "wpe.weight")


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
    model: ModelShape,
    layers: LayerRange,
    dtype_bytes: int,
    stored_dtype_bytes: int,
    policy: Policy,
    num_micro_batches: int,
    step_tokens: int,
    kv_block_tokens: int,
    kv_bytes: int | None = None,
) -> StageDemand:
    """`shapes` and `model` are the whole model's, `layers` the stage's. Numbers are computed with in `dtype_bytes` each, and
    are in `stored_dtype_bytes` in the checkpoint. `kv_bytes` is a wish that replaces the rule above."""
    own = _stage_shapes(shapes, model, layers)
    context, tokens = model.max_context_len, min(model.max_context_len, MEAN_TOKENS)
    most_tokens = max(policy.block_size * num_micro_batches * rounded_up(tokens, kv_block_tokens), context)
    layer_cache = rounded_up(most_tokens, kv_block_tokens) * kv_token_bytes(model, dtype_bytes, policy)
    return StageDemand(
        weights=sum(_stored(name, shape, stored_dtype_bytes, policy) for name, shape in own.items()),
        resident_weights=sum(_stored(name, shape, dtype_bytes, policy) for name, shape in own.items()),
        cache=kv_bytes or (layers.last - layers.first) * layer_cache,
        activations=2 * num_micro_batches * step_tokens * model.hidden_size * dtype_bytes,
        compute=_compute_bytes(model, layers, dtype_bytes, policy, step_tokens=step_tokens),
        weight_buffers=_weight_buffers(own, dtype_bytes, stored_dtype_bytes, policy),
        cache_workspace=2 * policy.gpu_batch_size * tokens * 2 * model.num_kv_heads * model.head_size * dtype_bytes,
        rounding=max(math.prod(shape[1:]) for shape in own.values()) * max(dtype_bytes, stored_dtype_bytes),
    )


def _stage_shapes(shapes: Shapes, model: ModelShape, layers: LayerRange) -> Shapes:
    own: Shapes = {}
    for name, shape in shapes.items():
        found = layer_name(name)
        if found is not None:
            is_own = found.layer in range(*layers)
        elif name in EMBEDDING:
            is_tied_head = name in TABLES and HEAD not in shapes
            is_own = layers.first == 0 or (is_tied_head and layers.last == model.num_layers)
        else:
            is_own = layers.last == model.num_layers
        if is_own:
            own[name] = shape
    return own


def _stored(name: str, shape: tuple[int, ...], dtype_bytes: int, policy: Policy) -> int:
    if not policy.compress_weight or not is_compressible(name, shape):
        return math.prod(shape) * dtype_bytes
    return shape[0] * policy.comp_weight_config.packed_bytes(shape[1])


def kv_token_bytes(model: ModelShape, dtype_bytes: int, policy: Policy) -> int:
    """Of one token in one layer."""
    heads, size = model.num_kv_heads, model.head_size
    return 2 * heads * (policy.comp_cache_config.packed_bytes(size) if policy.compress_cache else size * dtype_bytes)


def _compute_bytes(model: ModelShape, layers: LayerRange, dtype_bytes: int, policy: Policy, *, step_tokens: int) -> int:
    widest = max(model.hidden_size, model.num_heads * model.head_size)
    rows = step_tokens * (4 * widest + model.inner_size) * dtype_bytes
    logits = 2 * policy.block_size * model.vocab_size * 4  # in float32, and their probabilities
    return rows + (logits if layers.last == model.num_layers else 0)


def _weight_buffers(own: Shapes, dtype_bytes: int, stored_dtype_bytes: int, policy: Policy) -> int:
    """Of the largest of the layers' units."""
    units: dict[tuple[int, bool], int] = {}
    for name, shape in own.items():
        if found := layer_name(name):
            unit = found.layer, policy.sep_layer and found.is_attention
            numbers = math.prod(shape) * dtype_bytes if policy.compress_weight or dtype_bytes != stored_dtype_bytes else 0
            stored = _stored(name, shape, stored_dtype_bytes, policy)
            units[unit] = units.get(unit, 0) + stored + numbers + ALIGNMENT_BYTES
    return (UNITS_AHEAD if policy.overlap else 1) * max(units.values())


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step
