"""From logits to tokens. A draw depends on nothing but the sequence's own logits, seed and number of generated tokens.

Tokens race for a draw: each has a random time of its own, drawn from the seed, the number of tokens before and its id, divided
by its weight, and the first one wins (the Gumbel-max trick; Gumbel 1954). Rounding differs between a sequence that was decoded
and the same one computed again, and changes a winner only where two of them are as close as rounding. A running sum of weights,
in which one random number finds its place, has a bound for every token of the vocabulary, and each of them moves.

Shapes: R sequences (rows), V vocabulary, N tokens that may be drawn.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asyncpipe.wire.messages import Alternative, Sampling, TokenLogprobs
from asyncpipe_workers.indices import indices

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
LIKELY_ABOVE = -8.0  # the likeliest is at 0; others race among themselves, as often as all of them together are drawn
LIKELY = 512  # so many of the likeliest tokens are looked at before the whole vocabulary is sorted


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
        self._changes_logits = bool(
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.logit_bias
            or sampling.min_tokens
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_plain(self) -> bool:
        """Greedy, and nothing else asked for."""
        return not self._changes_logits and self.sampling.temperature == 0 and self.sampling.logprobs is None

    def push(self, token_id: int) -> None:
        """The token that was chosen, as the coordinator says."""
        self.token_ids.append(token_id)

    def choose(self, logits_V: torch.Tensor) -> int:
        scores_V = self._changed(logits_V.float()) if self._changes_logits else logits_V
        if self.sampling.temperature == 0:
            return int(scores_V.argmax())
        scaled_V = scores_V.to(torch.float64, copy=True)
        return self._draw(scaled_V.sub_(scaled_V.max()).div_(self.sampling.temperature))

    def _changed(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Penalties, then the bias, then what may not come yet."""
        options, scores_V = self.sampling, logits_V.clone()
        if options.repetition_penalty != 1.0:
            seen = indices(sorted(set(self.token_ids)), scores_V.device)
            old = scores_V[seen]
            scores_V[seen] = torch.where(old > 0, old / options.repetition_penalty, old * options.repetition_penalty)
        if (options.presence_penalty or options.frequency_penalty) and self.num_generated:
            counts = Counter(self.token_ids[self.num_prompt :])
            how_often = torch.tensor(list(counts.values()), dtype=scores_V.dtype, device=scores_V.device)
            scores_V[indices(list(counts), scores_V.device)] -= options.presence_penalty + options.frequency_penalty * how_often
        bias = {token_id: value for token_id, value in options.logit_bias.items() if token_id < len(scores_V)}
        if bias:
            scores_V[indices(list(bias), scores_V.device)] += torch.tensor(list(bias.values()), device=scores_V.device)
        if self.num_generated < options.min_tokens:
            ends = [token_id for token_id in self._ends if token_id < len(scores_V)]
            scores_V[indices(ends, scores_V.device)] = -torch.inf
        return scores_V

    def _draw(self, scaled_V: torch.Tensor) -> int:
        """`scaled_V` are (logits - the greatest) / temperature: in this order, no temperature is too small to divide by."""
        options = self.sampling
        if not options.top_k and options.top_p == 1.0 and options.min_p == 0.0:
            ids_N = self._tier(scaled_V)
        else:
            weights, order, total = self._likely(scaled_V)
            keep = (weights.cumsum(dim=-1) - weights < options.top_p * total) & (weights >= options.min_p)
            ids_N = order[keep]
        return self._winner(ids_N, scaled_V[ids_N])

    def _tier(self, scaled_V: torch.Tensor) -> torch.Tensor:
        """The likely tokens or all others, each as often as they are drawn: few random numbers are needed then."""
        weights_V, is_likely_V = scaled_V.exp(), scaled_V >= LIKELY_ABOVE
        ids_N = is_likely_V.nonzero()[:, 0]
        if self._uniform() * float(weights_V.sum()) < float(weights_V[ids_N].sum()):
            return ids_N
        others_N = (~is_likely_V & (weights_V > 0)).nonzero()[:, 0]
        return others_N if len(others_N) else ids_N

    def _winner(self, ids_N: torch.Tensor, scaled_N: torch.Tensor) -> int:
        """Which of these is drawn, in proportion to their exponentials."""
        uniforms_N = uniforms_of(self._random_bits(b"race"), ids_N)
        return int(ids_N[(scaled_N - uniforms_N.log_().neg_().log_()).argmax()])

    def _likely(self, scaled_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The likeliest tokens' weights, sorted (the first is 1), their ids, and what all that `top_p` is a part of weigh.

        There are `top_k` of them, or enough for `top_p` and `min_p`.
        """
        options = self.sampling
        if options.top_k:
            order = _greatest(scaled_V, options.top_k)
            weights = scaled_V[order].exp()
            return weights, order, float(weights.sum())
        total = float(scaled_V.exp().sum())
        order = _greatest(scaled_V, LIKELY)
        weights = scaled_V[order].exp()
        is_enough = options.top_p < 1.0 and float(weights.sum()) >= options.top_p * total
        if not is_enough and float(weights[-1]) >= options.min_p:
            order = _greatest(scaled_V, len(scaled_V))
            weights = scaled_V[order].exp()
        return weights, order, total

    def _uniform(self) -> float:
        """In [0, 1)."""
        return (self._random_bits(b"tier") >> 11) * 2.0**-53

    def _random_bits(self, purpose: bytes) -> int:
        """64 of them, from the seed and the number of tokens drawn before."""
        place = struct.pack("<QQ", self.sampling.seed or 0, self.num_generated)
        return int.from_bytes(hashlib.blake2b(place, digest_size=8, person=purpose).digest(), "little")


@dataclass(frozen=True, slots=True)
class Sampled:
    """`logprobs` is empty when nobody asked, else one entry a token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()


def sample(logits_RV: torch.Tensor, samplers: Sequence[Sampler]) -> Sampled:
    """One token for each sampler, in order."""
    token_ids: list[int] = logits_RV.argmax(dim=-1).tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.is_plain:
            token_ids[row] = sampler.choose(logits_RV[row])
    if all(sampler.sampling.logprobs is None for sampler in samplers):
        return Sampled(tuple(token_ids))
    logprobs = [
        None
        if (num_top := sampler.sampling.logprobs) is None
        else score(logits_RV[row : row + 1], [token_ids[row]], num_top)[0]
        for row, sampler in enumerate(samplers)
    ]
    return Sampled(tuple(token_ids), tuple(logprobs))


def score(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """What the model thinks of one token a row, and of its `num_top` likeliest alternatives."""
    logprobs_RV = logits_RV.float().log_softmax(dim=-1)
    chosen_R = logprobs_RV[torch.arange(len(token_ids)), indices(token_ids, logprobs_RV.device)]
    ranks = ((logprobs_RV > chosen_R[:, None]).sum(dim=-1) + 1).tolist()
    values, order = logprobs_RV.topk(min(num_top, logprobs_RV.shape[-1]), dim=-1)
    tops = [tuple(map(Alternative, ids, scores)) for ids, scores in zip(order.tolist(), values.tolist(), strict=True)]
    return tuple(map(TokenLogprobs, token_ids, chosen_R.tolist(), ranks, tops))


def uniforms_of(key: int, ids_N: torch.Tensor) -> torch.Tensor:
    """(N,) in (0, 1), float64: one for each id, the same whichever others are asked for.

    The key plus the id's multiple of an odd number, mixed as in SplitMix64 (Steele, Lea, Flood 2014, "Fast Splittable
    Pseudorandom Number Generators").
    """
    state_N = ids_N * _signed(GOLDEN) + _signed(key)
    for shift, factor in MIXING:
        state_N = (state_N ^ _shifted(state_N, shift)) * _signed(factor)
    state_N = state_N ^ _shifted(state_N, LAST_SHIFT)
    return (_shifted(state_N, 11).double() + 0.5) * 2.0**-53


def _shifted(state_N: torch.Tensor, shift: int) -> torch.Tensor:
    """To the right; zeros come from the left."""
    return (state_N >> shift) & ((1 << (64 - shift)) - 1)


def _signed(bits: int) -> int:
    """The same 64 bits as torch's integers count them."""
    return bits - (1 << 64) if bits >> 63 else bits


def _greatest(scaled_V: torch.Tensor, num: int) -> torch.Tensor:
    """Indices of the `num` greatest of numbers up to zero, in order; of equals the first is the first, as for argmax."""
    if num >= len(scaled_V):
        # The bits of positive floats are in their order, and integers are sorted ten times as fast.
        return scaled_V.abs().float().view(torch.int32).sort(stable=True).indices
    candidates = (scaled_V >= scaled_V.topk(num).values[-1]).nonzero()[:, 0]
    return candidates[scaled_V[candidates].sort(descending=True, stable=True).indices[:num]]
