"""OPT (Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language Models"), in all its published shapes.

Pre-norm with a final norm; the 350m variant is post-norm, without a final norm, and embeds in a narrower space (E) than it
computes in (D). Galactica and OPT-IML are configurations of the same code. Shapes: T rows of a step, R sequences, D hidden,
E embedding, F feed-forward, V vocabulary, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import embedding

from asyncpipe.errors import Invalid
from asyncpipe_workers.batch import StepLayout
from asyncpipe_workers.checkpoint import Checkpoint
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models.layers import ACTIVATIONS, QKV, LayerNorm, Linear, attend

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

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


class _Reader:
    """Reads a checkpoint's tensors in the wanted dtype."""

    def __init__(self, checkpoint: Checkpoint, config: OPTConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        self._device = device
        self.num_params = self.param_bytes = 0

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        # A copy, so that the checkpoint's mapped file can be let go.
        tensor = self._checkpoint.read(name, shape).to(device=self._device, dtype=self._dtype, copy=True)
        self.num_params += tensor.numel()
        self.param_bytes += tensor.nbytes
        return tensor

    def linear(self, name: str, out_size: int, in_size: int) -> Linear:
        bias = self.tensor(f"{name}.bias", out_size) if self._config.has_bias else None
        return Linear(self.tensor(f"{name}.weight", out_size, in_size), bias)

    def fused(self, names: list[str], out_size: int, in_size: int) -> Linear:
        """Several projections of the same input as one."""
        parts = [self.linear(name, out_size, in_size) for name in names]
        biases = [part.bias for part in parts if part.bias is not None]
        return Linear(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)

    def norm(self, name: str) -> LayerNorm:
        size = self._config.hidden_size
        if not self._config.norm_has_weights:
            return LayerNorm(size, None, None)
        return LayerNorm(size, self.tensor(f"{name}.weight", size), self.tensor(f"{name}.bias", size))


class DecoderLayer:
    def __init__(self, reader: _Reader, config: OPTConfig, index: int, cache_index: int) -> None:
        hidden, ffn, name = config.hidden_size, config.ffn_size, f"decoder.layers.{index}"
        self._shape_3HK = (3, config.num_heads, config.head_size)
        self._norm_first = config.norm_first
        self._cache_index = cache_index
        self._activation = ACTIVATIONS[config.activation]
        self.qkv = reader.fused([f"{name}.self_attn.{part}_proj" for part in "qkv"], hidden, hidden)
        self.out = reader.linear(f"{name}.self_attn.out_proj", hidden, hidden)
        self.attention_norm = reader.norm(f"{name}.self_attn_layer_norm")
        self.fc1 = reader.linear(f"{name}.fc1", ffn, hidden)
        self.fc2 = reader.linear(f"{name}.fc2", hidden, ffn)
        self.ffn_norm = reader.norm(f"{name}.final_layer_norm")

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        if self._norm_first:
            hidden_TD = hidden_TD + self._attention(self.attention_norm(hidden_TD), layout, cache)
            return hidden_TD + self._feed_forward(self.ffn_norm(hidden_TD))
        hidden_TD = self.attention_norm(hidden_TD + self._attention(hidden_TD, layout, cache))
        return self.ffn_norm(hidden_TD + self._feed_forward(hidden_TD))

    def _attention(self, x_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        qkv = QKV(*self.qkv(x_TD).view(len(x_TD), *self._shape_3HK).unbind(1))
        return self.out(attend(qkv, layout, cache, self._cache_index).reshape(x_TD.shape))

    def _feed_forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD: torch.Tensor = self.fc2(self._activation(self.fc1(x_TD)))
        return out_TD


class Embedding:
    """The first stage's part: tokens and positions to hidden states."""

    def __init__(self, reader: _Reader, config: OPTConfig) -> None:
        self.tokens_VE = reader.tensor("decoder.embed_tokens.weight", config.vocab_size, config.embedding_size)
        self.positions_PD = reader.tensor(
            "decoder.embed_positions.weight", config.max_context_len + POSITION_OFFSET, config.hidden_size
        )
        self.project_in = _projection(reader, "project_in", config.hidden_size, config.embedding_size)

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        x = embedding(token_ids_T, self.tokens_VE)
        if self.project_in is not None:
            x = self.project_in(x)
        return x + embedding(positions_T + POSITION_OFFSET, self.positions_PD)


class Head:
    """The last stage's part: hidden states to logits. A tied head shares the embedding where both are on one stage."""

    def __init__(self, reader: _Reader, config: OPTConfig, embedding: Embedding | None) -> None:
        self.norm = reader.norm("decoder.final_layer_norm") if config.has_final_norm else None
        self.project_out = _projection(reader, "project_out", config.embedding_size, config.hidden_size)
        if config.tied_head and embedding is not None:
            self.weight_VE = embedding.tokens_VE
        else:
            name = "decoder.embed_tokens.weight" if config.tied_head else "lm_head.weight"
            self.weight_VE = reader.tensor(name, config.vocab_size, config.embedding_size)

    def __call__(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        x = hidden_RD if self.norm is None else self.norm(hidden_RD)
        if self.project_out is not None:
            x = self.project_out(x)
        return torch.nn.functional.linear(x, self.weight_VE)


def _projection(reader: _Reader, name: str, out_size: int, in_size: int) -> Linear | None:
    if out_size == in_size:
        return None
    return Linear(reader.tensor(f"decoder.{name}.weight", out_size, in_size), None)


class OPTStage:
    """Decoder layers [first, last) of an OPT, with the embedding before the first layer and the head after the last."""

    def __init__(
        self, path: Path, config: OPTConfig, *, first: int, last: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        with Checkpoint(path) as checkpoint:
            reader = _Reader(checkpoint, config, dtype, device)
            self.embedding = Embedding(reader, config) if first == 0 else None
            self.layers = [DecoderLayer(reader, config, index, index - first) for index in range(first, last)]
            self.head = Head(reader, config, self.embedding) if last == config.num_layers else None
            self.num_params, self.param_bytes = reader.num_params, reader.param_bytes

    def __call__(self, input_T: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        """Token ids (T,) or hidden states (T, D) to hidden states (T, D); `head` makes logits of them on the last stage."""
        hidden_TD = input_T if self.embedding is None else self.embedding(input_T, layout.positions_T)
        for layer in self.layers:
            hidden_TD = layer(hidden_TD, layout, cache)
        return hidden_TD
