"""Attention: what goes in and comes out, what a form of it lets each query see, and attention of sequences' newest tokens.

Shapes: T rows of a step, N sequences, C cached tokens, H heads, G key-value heads (each for H / G = R heads), K head size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class QKV(NamedTuple):
    """q (T, H, K); k and v (T, G, K)."""

    q_THK: torch.Tensor
    k_TGK: torch.Tensor
    v_TGK: torch.Tensor


class KeysValues(NamedTuple):
    """Each (G, C, K), C the tokens asked for."""

    keys_GCK: torch.Tensor
    values_GCK: torch.Tensor


class AttentionForm(NamedTuple):
    """What some families add. Scores are scaled by 1 / sqrt(K); a family that wants another scale scales its queries."""

    window: int | None = None  # tokens that each one sees, itself among them; None: all before it
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.softcap is None


PLAIN = AttentionForm()


def attend_rows(
    q_NHK: torch.Tensor,
    keys_NGCK: torch.Tensor,
    values_NGCK: torch.Tensor,
    mask_N11C: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """(N, H, K): one new token of each of N sequences. Heads that share keys are rows of one product."""
    (num, num_heads, size), groups = q_NHK.shape, keys_NGCK.shape[1]
    q_NGRK = q_NHK.reshape(num, groups, num_heads // groups, size)
    if softcap is None and (q_NHK.dtype != torch.float32 or q_NHK.device.type != "cpu"):
        mask = None if mask_N11C is None else mask_N11C.to(q_NHK.dtype)
        out = F.scaled_dot_product_attention(q_NGRK, keys_NGCK, values_NGCK, attn_mask=mask)
        return out.reshape(q_NHK.shape)
    # On CPUs two products are quicker than the fused kernel, which is made for many queries.
    scores_NGRC = _scores(q_NGRK * (1 / math.sqrt(size)), keys_NGCK).float()
    weights_NGRC = attention_weights(scores_NGRC, mask_N11C, softcap).to(values_NGCK.dtype)
    return torch.matmul(weights_NGRC, values_NGCK).reshape(q_NHK.shape)


def attention_weights(scores_NGRC: torch.Tensor, mask_N11C: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
    """Of float32 scores, which may be overwritten, but only with numbers."""
    if softcap is not None:
        scores_NGRC = scores_NGRC.div_(softcap).tanh_().mul_(softcap)
    if mask_N11C is not None:
        scores_NGRC = scores_NGRC + mask_N11C
    return torch.softmax(scores_NGRC, dim=-1)


def _scores(q_NGRK: torch.Tensor, keys_NGCK: torch.Tensor) -> torch.Tensor:
    """(N, G, R, C). Keys times one query is a quarter quicker than the query times keys that are turned."""
    if q_NGRK.shape[2] == 1:
        return torch.matmul(keys_NGCK, q_NGRK.transpose(-1, -2)).transpose(-1, -2)
    return torch.matmul(q_NGRK, keys_NGCK.transpose(-1, -2))


def score_bias(queries_T: torch.Tensor, keys_C: torch.Tensor, window: int | None) -> torch.Tensor:
    """(T, C): of these positions, to be added to scores: 0 where the query sees the key, else -inf."""
    seen_TC = is_seen(queries_T, keys_C, window)
    return torch.zeros(seen_TC.shape, device=seen_TC.device).masked_fill_(~seen_TC, -math.inf)


def is_seen(queries_T: torch.Tensor, keys_C: torch.Tensor, window: int | None) -> torch.Tensor:
    distances_TC = queries_T[:, None] - keys_C
    is_seen_TC = distances_TC >= 0
    return is_seen_TC if window is None else is_seen_TC.logical_and_(distances_TC < window)
