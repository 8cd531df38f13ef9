"""From logits to tokens. A draw depends on nothing but the sequence's seed and how many tokens it has drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncpipe_workers.batch import Member

MIX = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbouring counts give unrelated generator seeds


def sample(logits_RV: torch.Tensor, members: Sequence[Member]) -> tuple[int, ...]:
    """One token for each member, in order; greedy where temperature is 0."""
    tokens: list[int] = logits_RV.argmax(dim=-1).tolist()
    for row, member in enumerate(members):
        if member.sampling.temperature > 0:
            tokens[row] = _draw(logits_RV[row], member)
        member.num_sampled += 1
    return tuple(tokens)


def _draw(logits_V: torch.Tensor, member: Member) -> int:
    """Temperature, then top-k, then top-p, in the order of Hugging Face's warpers."""
    options = member.sampling
    scaled_V = logits_V.double() / options.temperature
    sorted_V, order_V = scaled_V.sort(descending=True, stable=True)
    if options.top_k:
        sorted_V = sorted_V[: options.top_k]
    probabilities = sorted_V.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    if options.top_p < 1.0:
        num_kept = max(1, int(((cumulative - probabilities) < options.top_p).sum()))
        cumulative = cumulative[:num_kept]
    uniform = _uniform(options.seed, member.num_sampled)
    chosen = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return int(order_V[min(chosen, len(cumulative) - 1)])


def _uniform(seed: int, count: int) -> float:
    generator = torch.Generator()
    generator.manual_seed((seed ^ (count * MIX)) & 0x7FFFFFFFFFFFFFFF)
    return float(torch.rand((), generator=generator, dtype=torch.float64))
