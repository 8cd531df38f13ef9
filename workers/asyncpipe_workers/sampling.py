"""From logits to tokens. A draw depends on nothing but the sequence's own logits, seed and number of generated tokens.

Shapes: R sequences (rows), V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from asyncpipe.wire.messages import Alternative, Sampling, TokenLogprobs
from asyncpipe_workers.drawing import Draw, drawn
from asyncpipe_workers.indices import indices, numbers


class Sampler:
    """One sequence's parameters, and its tokens: the prompt's, then the generated ones."""

    def __init__(
        self,
        sampling: Sampling,
        token_ids: Sequence[int],
        *,
        num_prompt: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.sampling = sampling
        self.token_ids = list(token_ids)
        self.num_prompt = num_prompt
        self._ends = eos_token_ids | frozenset(sampling.stop_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def changes_logits(self) -> bool:
        """By penalties, biases, or what may not come yet."""
        options = self.sampling
        has_penalties = options.repetition_penalty != 1.0 or options.presence_penalty or options.frequency_penalty
        return bool(has_penalties or options.logit_bias or self.num_generated < options.min_tokens)

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def draw(self) -> Draw:
        """Of the next token, if it is not greedy: with random bits made from the seed and the number of tokens drawn before."""
        options = self.sampling
        place = struct.pack("<QQ", options.seed or 0, self.num_generated)
        uniform_bits, key = struct.unpack("<Qq", hashlib.blake2b(place, digest_size=16, person=b"draw").digest())
        return Draw(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            uniform=(uniform_bits >> 11) * 2.0**-53,
            key=key,
        )

    def push(self, token_id: int) -> None:
        """The token that was chosen, as the coordinator says."""
        self.token_ids.append(token_id)

    def change(self, scores_V: torch.Tensor) -> None:
        """In place: penalties, then the bias, then what may not come yet."""
        options, device = self.sampling, scores_V.device
        if options.repetition_penalty != 1.0:
            seen = indices(self.token_ids, device)  # some of them twice, with the same result
            old = scores_V[seen]
            scores_V[seen] = torch.where(old > 0, old / options.repetition_penalty, old * options.repetition_penalty)
        if (options.presence_penalty or options.frequency_penalty) and self.num_generated:
            counts = Counter(self.token_ids[self.num_prompt :])
            penalties = [options.presence_penalty + options.frequency_penalty * count for count in counts.values()]
            scores_V[indices(list(counts), device)] -= numbers(penalties, device, dtype=scores_V.dtype)
        bias = {token_id: value for token_id, value in options.logit_bias.items() if token_id < len(scores_V)}
        if bias:
            scores_V[indices(list(bias), device)] += numbers(list(bias.values()), device, dtype=scores_V.dtype)
        if self.num_generated < options.min_tokens:
            ends = [token_id for token_id in self._ends if token_id < len(scores_V)]
            scores_V.index_fill_(0, indices(ends, device), -torch.inf)


@dataclass(frozen=True, slots=True)
class Sampled:
    """`logprobs` is empty when nobody asked, else one entry a token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()


def sample(logits_RV: torch.Tensor, samplers: Sequence[Sampler]) -> Sampled:
    """One token for each sampler, in order."""
    token_ids: list[int] = chosen(logits_RV, samplers).tolist()
    if all(sampler.sampling.logprobs is None for sampler in samplers):
        return Sampled(tuple(token_ids))
    rows = [row for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None]
    most_top = max(samplers[row].sampling.logprobs or 0 for row in rows)
    logprobs: list[TokenLogprobs | None] = [None] * len(samplers)
    for row, scores in zip(rows, score(_rows(logits_RV, rows), [token_ids[row] for row in rows], most_top), strict=True):
        logprobs[row] = msgspec.structs.replace(scores, top=scores.top[: samplers[row].sampling.logprobs])
    return Sampled(tuple(token_ids), tuple(logprobs))


def chosen(logits_RV: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """The tokens, (R,) int64. On a GPU nobody waits for them."""
    scores_RV = logits_RV
    if any(sampler.changes_logits for sampler in samplers):
        scores_RV = logits_RV.to(torch.float32, copy=True)
        for scores_V, sampler in zip(scores_RV, samplers, strict=True):
            sampler.change(scores_V)
    rows = [row for row, sampler in enumerate(samplers) if not sampler.is_greedy]
    if not rows:
        return scores_RV.argmax(dim=-1)
    drawn_R = drawn(_rows(scores_RV, rows), [samplers[row].draw for row in rows])
    if len(rows) == len(samplers):
        return drawn_R
    return scores_RV.argmax(dim=-1).index_copy_(0, indices(rows, scores_RV.device), drawn_R)


def _rows(x_RV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return x_RV if len(rows) == len(x_RV) else x_RV[indices(rows, x_RV.device)]


def score(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """What the model thinks of one token a row, and of its `num_top` likeliest alternatives."""
    logprobs_RV = logits_RV.float().log_softmax(dim=-1)
    chosen_R = logprobs_RV[torch.arange(len(token_ids)), indices(token_ids, logprobs_RV.device)]
    ranks = ((logprobs_RV > chosen_R[:, None]).sum(dim=-1) + 1).tolist()
    values, order = logprobs_RV.topk(min(num_top, logprobs_RV.shape[-1]), dim=-1)
    tops = [tuple(map(Alternative, ids, scores)) for ids, scores in zip(order.tolist(), values.tolist(), strict=True)]
    return tuple(map(TokenLogprobs, token_ids, chosen_R.tolist(), ranks, tops))
