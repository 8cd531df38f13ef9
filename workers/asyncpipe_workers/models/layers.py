"""Arithmetic that decoder families share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from asyncpipe.model_shape import ModelShape
from asyncpipe_workers.models.weights import Projection, Weights

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu_,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": functools.partial(F.silu, inplace=True),
    "tanh": torch.tanh,
}
"""By the names that Hugging Face configurations use. Some change what they are given."""


@dataclass(frozen=True, slots=True)
class LayerNorm:
    size: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float = 1e-5

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x over its root mean square, times `weight`: (D,), or (N, D) where N heads have their own (Zhang and Sennrich 2019)."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x.to(self.weight.dtype), self.weight.shape[-1:], None, self.eps)
        return (normed * self.weight).to(x.dtype)


def logits(weights: Weights, config: ModelShape, first: int, last: int, *, table: str = "embed_tokens.weight") -> Projection:
    """Of tokens [first, last). A tied head is the embedding, `table`."""
    name = table if config.has_tied_head else "lm_head.weight"
    return weights.head(name, first, last, of=(config.vocab_size, config.hidden_size))
