"""Rotary positions (Su et al. 2021, "RoFormer"), and how families stretch them over longer contexts.

The frequencies are those of transformers' `modeling_rope_utils`. Shapes: T rows of a step, N heads, K head size, F frequencies:
the first 2F of a head's numbers are turned, number i together with number i + F.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.indices import indices
from asyncpipe_workers.layout import Rotation, StepLayout
from asyncpipe_workers.models.row_kernels import row_kernel

DEFAULT_THETA = 10_000.0

Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """`scale` multiplies what is turned. Sequences whose prompt is longer than `short_len` have the frequencies `long_F`."""

    inverse_F: torch.Tensor
    scale: float = 1.0
    long_F: torch.Tensor | None = None
    short_len: int = 0

    def rotation(self, layout: StepLayout, dtype: torch.dtype) -> Rotation:
        """For all layers that share these frequencies it is computed once in a step."""
        found = layout.rotations.get(self)
        if found is None:
            found = layout.rotations[self] = self._rotation(layout, dtype)
        return found

    def _rotation(self, layout: StepLayout, dtype: torch.dtype) -> Rotation:
        positions_T1 = layout.positions_T[:, None].float()
        inverse_F, long_F = _on_device(self, positions_T1.device)
        angles_TF = positions_T1 * inverse_F
        if long_F is not None:
            is_long_T1 = indices(layout.prompt_lens, positions_T1.device)[:, None] > self.short_len
            angles_TF = torch.where(is_long_T1, positions_T1 * long_F, angles_TF)
        cos_TF, sin_TF = (angles_TF.cos() * self.scale).to(dtype), (angles_TF.sin() * self.scale).to(dtype)
        return Rotation(torch.cat([cos_TF, cos_TF], dim=-1)[:, None], sin_TF[:, None])


@functools.cache
def _on_device(rope: Rope, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its frequencies, brought there once."""
    return rope.inverse_F.to(device), None if rope.long_F is None else rope.long_F.to(device)


def rotate(x_TNK: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """(T, N, K), which may be x, changed."""
    cos_T1K, sin_T1F = rotation
    (num_heads, size), num_turned = x_TNK.shape[1:], sin_T1F.shape[-1]
    kernel = row_kernel("TurnRows", x_TNK, num_turned)
    if kernel is not None and sin_T1F.dtype == x_TNK.dtype and x_TNK.stride()[1:] == (size, 1):
        counts = (len(x_TNK), num_heads, size, num_turned, x_TNK.stride(0), cos_T1K.shape[-1])
        kernel((x_TNK, cos_T1K, sin_T1F), counts)
        return x_TNK
    turned_TNK = x_TNK[..., : 2 * num_turned] * cos_T1K
    turned_TNK[..., :num_turned].addcmul_(x_TNK[..., num_turned : 2 * num_turned], sin_T1F, value=-1)
    turned_TNK[..., num_turned:].addcmul_(x_TNK[..., :num_turned], sin_T1F)
    return turned_TNK if 2 * num_turned == size else torch.cat([turned_TNK, x_TNK[..., 2 * num_turned :]], dim=-1)


def rope_parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of `model_fields`. Newer configurations have `rope_parameters`; older ones `rope_scaling`, and the rest beside it."""
    outer = {name: fields[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    return {**outer, **(fields.get("rope_parameters") or fields.get("rope_scaling") or {})}


def make_rope(parameters: Parameters, fields: Mapping[str, Any], head_size: int) -> Rope:
    """Raises Invalid for a type that is not known, and for one that lacks a parameter."""
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    context = fields["max_position_embeddings"]
    trained = fields.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings") or context
    size = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    plain_F = 1.0 / parameters.get("rope_theta", DEFAULT_THETA) ** (torch.arange(0, size, 2).float() / size)
    if kind not in _TYPES:
        raise Invalid(f"config.json: rope_type {kind!r} is not known; known: {', '.join(_TYPES)}")
    try:
        return _TYPES[kind](plain_F, parameters, context, trained)
    except KeyError as missing:
        raise Invalid(f"config.json: rope_type {kind!r} needs {missing}") from None


def _default(plain_F: torch.Tensor, parameters: Parameters, context: int, trained: int) -> Rope:
    return Rope(plain_F)


def _linear(plain_F: torch.Tensor, parameters: Parameters, context: int, trained: int) -> Rope:
    return Rope(plain_F / parameters["factor"])


def _llama3(plain_F: torch.Tensor, parameters: Parameters, context: int, trained: int) -> Rope:
    """Slow frequencies are stretched, quick ones stay, and there is a passage between them."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns_F = trained * plain_F / (2 * math.pi)
    share_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return Rope((1 - share_F) * plain_F / factor + share_F * plain_F)


def _yarn(plain_F: torch.Tensor, parameters: Parameters, context: int, trained: int) -> Rope:
    """Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models"."""
    factor = parameters.get("factor") or context / trained
    size, theta = 2 * len(plain_F), parameters.get("rope_theta", DEFAULT_THETA)

    def place(num_turns: float) -> float:
        return size * math.log(trained / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(parameters.get("beta_fast") or 32), place(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    share_F = 1 - ((torch.arange(len(plain_F)) - low) / (high - low or 0.001)).clamp(0, 1)
    return Rope((1 - share_F) * plain_F / factor + share_F * plain_F, _yarn_scale(factor, parameters))


def _yarn_scale(factor: float, parameters: Parameters) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(weight) / scale(weight_all) if weight and weight_all else scale(1.0)


def _longrope(plain_F: torch.Tensor, parameters: Parameters, context: int, trained: int) -> Rope:
    """Ding et al. 2024, "LongRoPE". A sequence keeps the frequencies that its prompt was computed with: keys that are cached
    could not change to others."""
    factor, scale = parameters.get("factor") or context / trained, parameters.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    short_F, long_F = (plain_F / torch.tensor(parameters[name]) for name in ("short_factor", "long_factor"))
    return Rope(short_F, scale, long_F, trained)


_TYPES: Mapping[str, Callable[[torch.Tensor, Parameters, int, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
