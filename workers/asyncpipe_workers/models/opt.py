"""OPT (Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language Models"), in all its published shapes.

Pre-norm with a final norm; the 350m variant is post-norm, without a final norm, and embeds in a narrower space (E) than it
computes in (D). Galactica and OPT-IML are configurations of the same code. Shapes: T rows of a step, R sequences, D hidden,
E embedding, F feed-forward, V vocabulary, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.attention import QKV
from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models.layers import ACTIVATIONS, LayerNorm, activated, added
from asyncpipe_workers.models.units import Blocks
from asyncpipe_workers.models.weights import Projection, Rows, Weights

POSITION_OFFSET = 2  # the first two rows of the position table belong to padding


@dataclass(frozen=True, slots=True)
class OPTConfig:
    """The fields of config.json that matter here."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    max_context_len: int
    embedding_size: int
    activation: str
    norm_first: bool
    has_final_norm: bool
    has_bias: bool
    norm_has_weights: bool
    tied_head: bool

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> OPTConfig:
        """Raises Invalid for a field that is missing, or an activation that is not known."""
        try:
            norm_first = config.get("do_layer_norm_before", True)
            parsed = cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                ffn_size=config["ffn_dim"],
                max_context_len=config["max_position_embeddings"],
                embedding_size=config.get("word_embed_proj_dim", config["hidden_size"]),
                activation=config.get("activation_function", "relu"),
                norm_first=norm_first,
                has_final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
                has_bias=config.get("enable_bias", True),
                norm_has_weights=config.get("layer_norm_elementwise_affine", True),
                tied_head=config.get("tie_word_embeddings", True),
            )
        except KeyError as missing:
            raise Invalid(f"config.json lacks {missing}") from None
        if parsed.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise Invalid(f"config.json: activation_function {parsed.activation!r} is not known; known: {known}")
        return parsed

    has_plain_attention = True

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


def _norm(weights: Weights, config: OPTConfig, name: str) -> LayerNorm:
    size = config.hidden_size
    if not config.norm_has_weights:
        return LayerNorm(size, None, None)
    return LayerNorm(size, weights.vector(f"{name}.weight", size), weights.vector(f"{name}.bias", size))


class Attention:
    """With its norm and its residual connection."""

    def __init__(self, weights: Weights, config: OPTConfig, index: int, cache_layer: int) -> None:
        hidden, name = config.hidden_size, f"decoder.layers.{index}"
        self._shape_3HK = (3, config.num_heads, config.head_size)
        self._norm_first = config.norm_first
        self._cache_layer = cache_layer
        qkv = [Rows(f"{name}.self_attn.{part}_proj", hidden) for part in "qkv"]
        self.qkv = weights.linear(qkv, hidden, bias=config.has_bias)
        self.out = weights.linear([Rows(f"{name}.self_attn.out_proj", hidden)], hidden, bias=config.has_bias)
        self.norm = _norm(weights, config, f"{name}.self_attn_layer_norm")

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        if self._norm_first:
            return added(self._attend(self.norm(hidden_TD), layout, cache), hidden_TD)
        return self.norm(added(self._attend(hidden_TD, layout, cache), hidden_TD))

    def _attend(self, x_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        qkv = QKV(*self.qkv(x_TD).view(len(x_TD), *self._shape_3HK).unbind(1))
        return self.out(cache.attend(self._cache_layer, qkv, layout).reshape(x_TD.shape))


class FeedForward:
    """With its norm and its residual connection."""

    def __init__(self, weights: Weights, config: OPTConfig, index: int) -> None:
        hidden, ffn, name = config.hidden_size, config.ffn_size, f"decoder.layers.{index}"
        self._norm_first = config.norm_first
        self._activation = config.activation
        self.fc1 = weights.linear([Rows(f"{name}.fc1", ffn)], hidden, bias=config.has_bias)
        self.fc2 = weights.linear([Rows(f"{name}.fc2", hidden)], ffn, bias=config.has_bias)
        self.norm = _norm(weights, config, f"{name}.final_layer_norm")

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        if self._norm_first:
            return added(self._feed(self.norm(hidden_TD)), hidden_TD)
        return self.norm(added(self._feed(hidden_TD), hidden_TD))

    def _feed(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.fc2(activated(self.fc1(x_TD), self._activation))


class Embedding:
    """The first stage's part: tokens and positions to hidden states."""

    def __init__(self, weights: Weights, config: OPTConfig) -> None:
        self.tokens = weights.table("decoder.embed_tokens.weight", config.vocab_size, config.embedding_size)
        num_positions = config.max_context_len + POSITION_OFFSET
        self.positions = weights.table("decoder.embed_positions.weight", num_positions, config.hidden_size)
        self.project_in = _projection(weights, "project_in", config.hidden_size, config.embedding_size)

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        x = self.tokens(token_ids_T)
        if self.project_in is not None:
            x = self.project_in(x)
        return x + self.positions(positions_T + POSITION_OFFSET)


class HeadInput:
    """The last stage's part before the logits: hidden states (R, D) to (R, E)."""

    def __init__(self, weights: Weights, config: OPTConfig) -> None:
        self.norm = _norm(weights, config, "decoder.final_layer_norm") if config.has_final_norm else None
        self.project_out = _projection(weights, "project_out", config.embedding_size, config.hidden_size)

    def __call__(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        x = hidden_RD if self.norm is None else self.norm(hidden_RD)
        return x if self.project_out is None else self.project_out(x)


def _projection(weights: Weights, name: str, out_size: int, in_size: int) -> Projection | None:
    if out_size == in_size:
        return None
    return weights.linear([Rows(f"decoder.{name}", out_size)], in_size, bias=False)


def _logits(weights: Weights, config: OPTConfig, first: int, last: int) -> Projection:
    """Of tokens [first, last). A tied head is the embedding."""
    name = "decoder.embed_tokens.weight" if config.tied_head else "lm_head.weight"
    return weights.head(name, first, last, of=(config.vocab_size, config.embedding_size))


def opt_blocks(config: OPTConfig) -> Blocks:
    return Blocks.of(
        config, embedding=Embedding, attention=Attention, feed_forward=FeedForward, head_input=HeadInput, logits=_logits
    )
