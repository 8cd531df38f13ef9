"""Attention of one new token over past tokens that are in several places.

Shapes: C past tokens of a segment, H heads, G key-value heads, K head size, N chosen tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from asyncpipe_workers.attention import KeysValues

Gather = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """Keys (C, G, K), on whichever device they are, and values: all (C, G, K), or `gather` for (H, N) of them."""

    keys: torch.Tensor
    values: torch.Tensor | None
    gather: Gather | None = None

    def whole_values(self) -> torch.Tensor:
        assert self.values is not None  # noqa: S101 - fetched whole by those who call this
        return self.values

    def values_of(self, chosen_HN: torch.Tensor) -> torch.Tensor:
        """(H, N, K) of the tokens with these indices, each head its own."""
        if self.gather is not None:
            return self.gather(chosen_HN)
        values_CGK = self.whole_values()
        return values_CGK[chosen_HN, kv_heads(len(chosen_HN), values_CGK.shape[1], chosen_HN.device)]


def kv_heads(num_heads: int, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """(H, 1): which keys and values are each head's."""
    return (torch.arange(num_heads, device=device) // (num_heads // num_kv_heads))[:, None]


def attend_densely(q_HK: torch.Tensor, segments: Sequence[Segment], newest: KeysValues) -> torch.Tensor:
    """(H, K). `newest` is the token's own key and value, (1, G, K) each. A segment elsewhere than on q's device is attended to
    there, in float32: only q and a result go to and fro."""
    newest_HK = _for_heads(newest.values_GCK[0], len(q_HK))
    if not segments:
        return newest_HK
    weights = _weights(q_HK, segments, newest)
    out_HK = weights[-1] * newest_HK
    for weights_HC, segment in zip(weights, segments, strict=False):
        values_CGK = segment.whole_values()
        weights_GRC = weights_HC.view(values_CGK.shape[1], -1, len(values_CGK)).to(values_CGK)
        out_HK = out_HK + torch.bmm(weights_GRC, values_CGK.transpose(0, 1)).reshape(out_HK.shape).to(out_HK)
    return out_HK


def attend_sparsely(q_HK: torch.Tensor, segments: Sequence[Segment], newest: KeysValues, *, sparsity: float) -> torch.Tensor:
    """(H, K). Of C past tokens each head keeps the `int(sparsity * C)` with the largest weights, and the newest; weights are
    not normalized again (FlexGen, section 4.2 of Sheng et al. 2023)."""
    newest_HK = _for_heads(newest.values_GCK[0], len(q_HK))
    if not segments:
        return newest_HK
    weights = _weights(q_HK, segments, newest)
    past_HC = torch.cat(weights[:-1], dim=1)
    out_HK = weights[-1] * newest_HK
    num_kept = int(sparsity * past_HC.shape[1])
    kept_HN = past_HC.topk(num_kept, dim=1).indices
    start = 0
    for segment in segments:
        length = len(segment.keys)
        inside = (kept_HN >= start) & (kept_HN < start + length)
        if num_kept and bool(inside.any()):
            chosen_HN = torch.where(inside, kept_HN - start, 0)
            kept_weights_HN = torch.where(inside, past_HC.gather(1, kept_HN), 0.0)
            values_HNK = segment.values_of(chosen_HN.to(segment.keys.device)).to(out_HK)
            out_HK = out_HK + torch.einsum("hn,hnk->hk", kept_weights_HN.to(out_HK), values_HNK)
        start += length
    return out_HK


def _weights(q_HK: torch.Tensor, segments: Sequence[Segment], newest: KeysValues) -> list[torch.Tensor]:
    """Softmax over everything, in float32: (H, C) for each segment, (H, 1) for the newest token."""
    q_HK = q_HK / math.sqrt(q_HK.shape[-1])
    scores = []
    for segment in segments:
        keys_CGK = segment.keys
        q_GRK = q_HK.view(keys_CGK.shape[1], -1, q_HK.shape[-1]).to(keys_CGK)
        scores_GRC = torch.bmm(q_GRK, keys_CGK.permute(1, 2, 0))
        scores.append(scores_GRC.reshape(len(q_HK), -1).to(q_HK.device, torch.float32))
    scores.append((q_HK * _for_heads(newest.keys_GCK[0], len(q_HK))).sum(-1, keepdim=True).float())
    weights_HC = F.softmax(torch.cat(scores, dim=1), dim=1).to(q_HK.dtype)
    return list(torch.split(weights_HC, [*(len(segment.keys) for segment in segments), 1], dim=1))


def _for_heads(x_GK: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(H, K): each head's own."""
    return x_GK.repeat_interleave(num_heads // len(x_GK), dim=0)
