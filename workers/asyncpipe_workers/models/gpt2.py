"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Its matrices are stored as (in, out). Shapes: T rows of a step, R rows that tokens are made of, D hidden, H heads, K head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asyncpipe.errors import Invalid
from asyncpipe.model_shape import ModelShape
from asyncpipe_workers.attention import QKV
from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models.layers import ACTIVATIONS, LayerNorm, activated, added, logits, scaled
from asyncpipe_workers.models.units import Blocks
from asyncpipe_workers.models.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(ModelShape):
    """Scores are divided by sqrt(K) if `divides_scores`, and by the layer's number, from 1 on, if `divides_by_layer`."""

    activation: str
    norm_eps: float
    divides_scores: bool
    divides_by_layer: bool

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> GPT2Config:
        """Of `model_fields`. Raises Invalid."""
        activation = fields.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            raise Invalid(f"config.json: activation_function {activation!r} is not known; known: {', '.join(ACTIVATIONS)}")
        return cls(
            **dataclasses.asdict(ModelShape.from_fields(fields)),
            activation=activation,
            norm_eps=fields.get("layer_norm_epsilon", 1e-5),
            divides_scores=fields.get("scale_attn_weights", True),
            divides_by_layer=fields.get("scale_attn_by_inverse_layer_idx", False),
        )

    has_plain_attention = True

    def query_factor(self, layer: int) -> float:
        """Of queries whose scores are divided by sqrt(K) later."""
        factor = 1.0 if self.divides_scores else self.head_size**0.5
        return factor / (layer + 1) if self.divides_by_layer else factor


def _norm(weights: Weights, config: GPT2Config, name: str) -> LayerNorm:
    size = config.hidden_size
    return LayerNorm(size, weights.vector(f"{name}.weight", size), weights.vector(f"{name}.bias", size), config.norm_eps)


class Attention:
    """With its norm and its residual connection."""

    def __init__(self, weights: Weights, config: GPT2Config, index: int, cache_layer: int) -> None:
        hidden, name = config.hidden_size, f"h.{index}"
        self._shape_3HK = (3, config.num_heads, config.head_size)
        self._cache_layer = cache_layer
        self._query_factor = config.query_factor(index)
        self.qkv = weights.transposed(f"{name}.attn.c_attn", hidden, 3 * hidden, bias=True)
        self.out = weights.transposed(f"{name}.attn.c_proj", hidden, hidden, bias=True)
        self.norm = _norm(weights, config, f"{name}.ln_1")

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        q_THK, k_THK, v_THK = self.qkv(self.norm(hidden_TD)).view(len(hidden_TD), *self._shape_3HK).unbind(1)
        if self._query_factor != 1.0:
            scaled(q_THK, self._query_factor)
        attended_THK = cache.attend(self._cache_layer, QKV(q_THK, k_THK, v_THK), layout)
        return added(self.out(attended_THK.reshape(hidden_TD.shape)), hidden_TD)


class FeedForward:
    """With its norm and its residual connection."""

    def __init__(self, weights: Weights, config: GPT2Config, index: int) -> None:
        hidden, ffn, name = config.hidden_size, config.ffn_size, f"h.{index}"
        self._activation = config.activation
        self.fc = weights.transposed(f"{name}.mlp.c_fc", hidden, ffn, bias=True)
        self.out = weights.transposed(f"{name}.mlp.c_proj", ffn, hidden, bias=True)
        self.norm = _norm(weights, config, f"{name}.ln_2")

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        return added(self.out(activated(self.fc(self.norm(hidden_TD)), self._activation)), hidden_TD)


class Embedding:
    """Tokens and positions to hidden states (T, D)."""

    def __init__(self, weights: Weights, config: GPT2Config) -> None:
        self.tokens = weights.table("wte.weight", config.vocab_size, config.hidden_size)
        self.positions = weights.table("wpe.weight", config.max_context_len, config.hidden_size)

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        return self.tokens(token_ids_T) + self.positions(positions_T)


def gpt2_blocks(config: GPT2Config) -> Blocks:
    return Blocks.of(
        config,
        embedding=Embedding,
        attention=Attention,
        feed_forward=FeedForward,
        head_input=functools.partial(_norm, name="ln_f"),
        logits=functools.partial(logits, table="wte.weight"),
    )
