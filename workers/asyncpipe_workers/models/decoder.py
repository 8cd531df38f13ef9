"""The decoder that most families are: norms before each part (RMSNorm), rotary positions, key-value heads that several query
heads share, and gated feed-forward parts (Touvron et al. 2023, "LLaMA").

Shapes: T rows of a step, R rows that tokens are made of, D hidden, F feed-forward, H heads, G key-value heads, K head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from asyncpipe.errors import Invalid
from asyncpipe.model_shape import ModelShape
from asyncpipe_workers.attention import QKV, AttentionForm
from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models.layers import ACTIVATIONS, RMSNorm, added, gated, logits, scaled
from asyncpipe_workers.models.rope import Rope, make_rope, rope_parameters, rotate
from asyncpipe_workers.models.units import Blocks, Layer
from asyncpipe_workers.models.weights import Projection, Rows, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelShape):
    """`ropes` and `windows` are of each layer; a window that is no shorter than the context is None."""

    activation: str
    norm_eps: float
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_ffn_bias: bool = False
    has_fused_matrices: bool = False  # one for queries, keys and values, and one for gate and up
    has_head_norms: bool = False  # of each head's query and key
    norm_offset: float = 0.0  # added to the weights of norms
    score_scale: float | None = None  # None: 1 / sqrt(K)
    score_softcap: float | None = None
    logit_softcap: float | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], *, rope: Mapping[str, Any] | None = None, **own: Any) -> Self:
        """Of `model_fields`; `rope` are parameters in place of the configuration's, and `own` is what the family says itself.
        Raises Invalid."""
        shape = ModelShape.from_fields(fields)
        activation = fields.get("hidden_activation") or fields.get("hidden_act") or "silu"
        if activation not in ACTIVATIONS:
            raise Invalid(f"config.json: activation {activation!r} is not known; known: {', '.join(ACTIVATIONS)}")
        common: dict[str, Any] = {
            "activation": activation,
            "norm_eps": fields.get("rms_norm_eps", 1e-6),
            "windows": (None,) * shape.num_layers,
        }
        if "ropes" not in own:
            common["ropes"] = (make_rope(rope or rope_parameters(fields), fields, shape.head_size),) * shape.num_layers
        return cls(**dataclasses.asdict(shape), **(common | own))

    @property
    def has_plain_attention(self) -> bool:
        return self.score_softcap is None and not any(self.windows)

    def norm(self, weights: Weights, name: str) -> RMSNorm:
        return RMSNorm(self._norm_weight(weights, f"{name}.weight", self.hidden_size), self.norm_eps)

    def head_norm(self, weights: Weights, name: str) -> RMSNorm:
        """Of queries and keys side by side."""
        q_K, k_K = (self._norm_weight(weights, f"{name}.{part}_norm.weight", self.head_size) for part in "qk")
        both_NK = torch.cat([q_K.expand(self.num_heads, -1), k_K.expand(self.num_kv_heads, -1)])
        return RMSNorm(both_NK, self.norm_eps)

    def _norm_weight(self, weights: Weights, name: str, size: int) -> torch.Tensor:
        weight = weights.vector(name, size)
        return weight.float() + self.norm_offset if self.norm_offset else weight


def sliding_windows(fields: Mapping[str, Any], is_sliding: Iterable[bool]) -> tuple[int | None, ...]:
    """Of each layer, by whether it has one."""
    window = fields.get("sliding_window")
    if window is not None and window >= fields["max_position_embeddings"]:
        window = None
    return tuple(window if each else None for each in is_sliding)


class SelfAttention:
    """Hidden states (T, D), normed, to what is added to them."""

    def __init__(self, weights: Weights, config: DecoderConfig, index: int, cache_layer: int) -> None:
        heads, kv_heads, size, hidden = config.num_heads, config.num_kv_heads, config.head_size, config.hidden_size
        name = f"layers.{index}.self_attn"
        self._num_heads, self._num_kv_heads, self._head_size = heads, kv_heads, size
        self._cache_layer = cache_layer
        self._rope = config.ropes[index]
        self._form = AttentionForm(config.windows[index], config.score_softcap)
        self._query_factor = 1.0 if config.score_scale is None else config.score_scale * math.sqrt(size)
        parts = [Rows(f"{name}.{part}_proj", num * size) for part, num in zip("qkv", (heads, kv_heads, kv_heads), strict=True)]
        if config.has_fused_matrices:
            parts = [Rows(f"{name}.qkv_proj", sum(part.size for part in parts))]
        self.qkv = weights.linear(parts, hidden, bias=config.has_qkv_bias)
        self.out = weights.linear([Rows(f"{name}.o_proj", hidden)], heads * size, bias=config.has_out_bias)
        self.head_norm = config.head_norm(weights, name) if config.has_head_norms else None

    def __call__(self, x_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        num_turned = self._num_heads + self._num_kv_heads
        qkv_TNK = self.qkv(x_TD).view(len(x_TD), -1, self._head_size)
        qk_TNK, v_TGK = qkv_TNK[:, :num_turned], qkv_TNK[:, num_turned:]
        if self.head_norm is not None:
            qk_TNK = self.head_norm(qk_TNK)
        qk_TNK = rotate(qk_TNK, self._rope.rotation(layout, qk_TNK.dtype))
        q_THK, k_TGK = qk_TNK[:, : self._num_heads], qk_TNK[:, self._num_heads :]
        if self._query_factor != 1.0:
            scaled(q_THK, self._query_factor)
        attended_THK = cache.attend(self._cache_layer, QKV(q_THK, k_TGK, v_TGK), layout, self._form)
        return self.out(attended_THK.reshape(len(x_TD), -1))


class GatedFeedForward:
    """Hidden states (T, D), normed, to what is added to them. `gate_up` are Rows of gate, then of up."""

    def __init__(
        self, weights: Weights, config: DecoderConfig, gate_up: list[Rows], down: str, *, size: int | None = None
    ) -> None:
        hidden = config.hidden_size
        self._activation = config.activation
        self.gate_up = weights.linear(gate_up, hidden, bias=config.has_ffn_bias)
        self.down = weights.linear([Rows(down, hidden)], size or config.ffn_size, bias=config.has_ffn_bias)

    def __call__(self, x_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        return self.apply(x_TD)

    def apply(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down(gated(self.gate_up(x_TD), self._activation))


class Residual:
    """x + after(part(before(x)))."""

    def __init__(self, part: Layer, before: RMSNorm, after: RMSNorm | None = None) -> None:
        self.part = part
        self.before = before
        self.after = after

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        y_TD = self.part(self.before(hidden_TD), layout, cache)
        return added(y_TD if self.after is None else self.after(y_TD), hidden_TD)


class Embedding:
    """Tokens to hidden states (T, D); positions come in with attention."""

    def __init__(self, weights: Weights, config: DecoderConfig) -> None:
        self.tokens = weights.table("embed_tokens.weight", config.vocab_size, config.hidden_size)

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        return self.tokens(token_ids_T)


def attention(weights: Weights, config: DecoderConfig, index: int, cache_layer: int) -> Residual:
    part = SelfAttention(weights, config, index, cache_layer)
    return Residual(part, config.norm(weights, f"layers.{index}.input_layernorm"))


def dense_part(weights: Weights, config: DecoderConfig, index: int) -> GatedFeedForward:
    name, size = f"layers.{index}.mlp", config.ffn_size
    gate_up = [Rows(f"{name}.gate_proj", size), Rows(f"{name}.up_proj", size)]
    if config.has_fused_matrices:
        gate_up = [Rows(f"{name}.gate_up_proj", 2 * size)]
    return GatedFeedForward(weights, config, gate_up, f"{name}.down_proj")


def feed_forward(weights: Weights, config: DecoderConfig, index: int) -> Residual:
    return Residual(dense_part(weights, config, index), config.norm(weights, f"layers.{index}.post_attention_layernorm"))


def head_input(weights: Weights, config: DecoderConfig) -> Projection:
    return config.norm(weights, "norm")


def decoder_blocks(config: DecoderConfig, **own: Callable[..., Any]) -> Blocks:
    """`own` are those that the family builds itself."""
    builders: dict[str, Callable[..., Any]] = {
        "embedding": Embedding,
        "attention": attention,
        "feed_forward": feed_forward,
        "head_input": head_input,
        "logits": logits,
    }
    return Blocks.of(config, **(builders | own))
