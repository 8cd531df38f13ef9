"""Arithmetic that decoder families share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from asyncpipe.model_shape import ModelShape
from asyncpipe_workers.models.row_kernels import row_kernel
from asyncpipe_workers.models.weights import Projection, Weights
from asyncpipe_workers.tape import new_tensor

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
        kernel = row_kernel("LayerNormRows", x, self.size, self.eps)
        if kernel is None or self.weight is None or self.bias is None or x.dtype != self.weight.dtype:
            return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
        y = new_tensor(*x.shape)
        kernel((x, y, self.weight, self.bias), (len(x), self.size, x.stride(0)))
        return y


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x over its root mean square, times `weight` (Zhang and Sennrich 2019): (T, D) with (D,), or (T, N, D) with (N, D) where N
    heads have their own."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        size = self.weight.shape[-1]
        kernel = row_kernel("RMSNormRows", x, size, self.eps)
        if kernel is None or self.weight.dtype != x.dtype or x.stride()[1:] != self.weight.stride():
            return (F.rms_norm(x.to(self.weight.dtype), (size,), None, self.eps) * self.weight).to(x.dtype)
        y = new_tensor(*x.shape)
        kernel((x, y, self.weight), (len(x), self.weight.numel() // size, size, x.stride(0)))
        return y


def activated(x_TF: torch.Tensor, activation: str) -> torch.Tensor:
    """(T, F), which may be x, changed."""
    kernel = row_kernel("ActivationRows", x_TF, x_TF.shape[1], activation)
    if kernel is None:
        return ACTIVATIONS[activation](x_TF)
    kernel((x_TF,), (*x_TF.shape, x_TF.stride(0)))
    return x_TF


def added(y_TD: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """y, to which x has been added."""
    kernel = row_kernel("AddRows", y_TD, y_TD.shape[1])
    if kernel is None or x_TD.dtype != y_TD.dtype or x_TD.stride(1) != 1:
        return y_TD.add_(x_TD)
    kernel((y_TD, x_TD), (*y_TD.shape, y_TD.stride(0), x_TD.stride(0)))
    return y_TD


def scaled(x_THK: torch.Tensor, factor: float) -> torch.Tensor:
    """x, multiplied where it lies."""
    kernel = row_kernel("ScaleRows", x_THK, x_THK.shape[1] * x_THK.shape[2], factor)
    if kernel is None or x_THK.stride(1) != x_THK.shape[2]:
        return x_THK.mul_(factor)
    kernel((x_THK,), (len(x_THK), x_THK.shape[1] * x_THK.shape[2], x_THK.stride(0)))
    return x_THK


def gated(gate_up_T2F: torch.Tensor, activation: str) -> torch.Tensor:
    """(T, F): the activation of the first half times the second. What is given may be changed."""
    size = gate_up_T2F.shape[1] // 2
    kernel = row_kernel("GateRows", gate_up_T2F, size, activation)
    if kernel is None:
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate_TF).mul_(up_TF)
    y_TF = new_tensor(len(gate_up_T2F), size)
    kernel((gate_up_T2F, y_TF), (len(y_TF), size, gate_up_T2F.stride(0)))
    return y_TF


def logits(weights: Weights, config: ModelShape, first: int, last: int, *, table: str = "embed_tokens.weight") -> Projection:
    """Of tokens [first, last). A tied head is the embedding, `table`."""
    name = table if config.has_tied_head else "lm_head.weight"
    return weights.head(name, first, last, of=(config.vocab_size, config.hidden_size))
