"""Attention of one new token over past tokens that are in several places.

Shapes: C past tokens of a segment, H heads, K head size, N chosen tokens.
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
    """Keys (C, H, K), on whichever device they are, and values: all (C, H, K), or `gather` for (H, N) of them."""

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
        heads_H1 = torch.arange(len(chosen_HN), device=chosen_HN.device)[:, None]
        return self.whole_values()[chosen_HN, heads_H1]


def attend_densely(q_HK: torch.Tensor, segments: Sequence[Segment], newest: KeysValues) -> torch.Tensor:
    """(H, K). `newest` is the token's own key and value, (1, H, K) each. A segment elsewhere than on q's device is attended to
    there, in float32: only q and a result go to and fro."""
    if not segments:
        return newest.values_HCK[0]
    weights = _weights(q_HK, segments, newest)
    out_HK = weights[-1] * newest.values_HCK[0]
    for weights_HC, segment in zip(weights, segments, strict=False):
        values_CHK = segment.whole_values()
        partial_H1K = torch.bmm(weights_HC[:, None].to(values_CHK), values_CHK.transpose(0, 1))
        out_HK = out_HK + partial_H1K[:, 0].to(out_HK)
    return out_HK


def attend_sparsely(q_HK: torch.Tensor, segments: Sequence[Segment], newest: KeysValues, *, sparsity: float) -> torch.Tensor:
    """(H, K). Of C past tokens each head keeps the `int(sparsity * C)` with the largest weights, and the newest; weights are
    not normalized again (FlexGen, section 4.2 of Sheng et al. 2023)."""
    if not segments:
        return newest.values_HCK[0]
    weights = _weights(q_HK, segments, newest)
    past_HC = torch.cat(weights[:-1], dim=1)
    out_HK = weights[-1] * newest.values_HCK[0]
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
    q_H1K = q_HK[:, None] / math.sqrt(q_HK.shape[-1])
    scores = []
    for segment in segments:
        keys_CHK = segment.keys
        scores.append(torch.bmm(q_H1K.to(keys_CHK), keys_CHK.permute(1, 2, 0))[:, 0].to(q_HK.device, torch.float32))
    scores.append((q_H1K[:, 0] * newest.keys_HCK[0]).sum(-1, keepdim=True).float())
    weights_HC = F.softmax(torch.cat(scores, dim=1), dim=1).to(q_HK.dtype)
    return list(torch.split(weights_HC, [*(len(segment.keys) for segment in segments), 1], dim=1))
