"""Draws of tokens, of all rows at once: nothing looks at a number before all are drawn.

Tokens race for a draw: each has a random time of its own, made from a key and its id, divided by its weight, and the first one
wins (Gumbel 1954; Efraimidis and Spirakis 2006). Rounding differs between a sequence that was decoded and the same one computed
again, and changes a winner only where two of them are as close as rounding. A running sum of weights, in which one random
number finds its place, has a bound for every token of the vocabulary, and each of them moves.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from asyncpipe_workers.indices import indices, numbers

LIKELY_ABOVE = -8.0  # the likeliest is at 0; others race among themselves, as often as all of them together are drawn
LIKELY = 512  # on a CPU, so many of the likeliest tokens are looked at before all are sorted
MOST_NUMBERS = 1 << 18  # of logits at once, each of which becomes several in double precision: a cache holds them
MOST_NUMBERS_OF_GPU = 1 << 22

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


class Draw(NamedTuple):
    """What a row's token depends on beside its logits. `top_k`, `top_p` and `min_p` keep the likely tokens, in this order."""

    temperature: float
    top_k: int  # 0: off
    top_p: float  # 1.0: off
    min_p: float  # 0.0: off
    uniform: float  # in [0, 1): without limits, whether one of the likely tokens is drawn or one of the others
    key: int  # signed, 64 bits: of the random times

    @property
    def is_limited(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def drawn(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """A token for each row, (R,) int64. On a GPU nobody waits for it."""
    if logits_RV.device.type == "cpu" and (kernel := compiled_draw()) is not None:
        return kernel(logits_RV.float(), draws)
    most_numbers = MOST_NUMBERS if logits_RV.device.type == "cpu" else MOST_NUMBERS_OF_GPU
    num_rows = max(most_numbers // logits_RV.shape[1], 1)
    starts = range(0, len(draws), num_rows)
    return torch.cat([_first(logits_RV[start : start + num_rows], draws[start : start + num_rows]) for start in starts])


def _first(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    weights_RV = weights_of(logits_RV, draws)
    keys_R1 = indices([[draw.key] for draw in draws], logits_RV.device)
    times_RV = uniforms_of(keys_R1, torch.arange(logits_RV.shape[1], device=logits_RV.device)).log_().neg_()
    return times_RV.div_(weights_RV).argmin(dim=-1)


def weights_of(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """What each token races with, (R, V) in float64: in proportion to its probability, or zero if it is not kept."""
    device = logits_RV.device
    values = [[(draw.temperature,), (draw.uniform,), (draw.top_p,), (draw.min_p,)] for draw in draws]
    temperatures_R1, uniforms_R1, top_p_R1, min_p_R1 = numbers(values, device, dtype=torch.float64).unbind(1)
    scaled_RV = logits_RV.double()
    scaled_RV = (scaled_RV - scaled_RV.amax(dim=-1, keepdim=True)).div_(temperatures_R1)
    weights_RV, is_likely_RV = scaled_RV.exp(), scaled_RV >= LIKELY_ABOVE
    likely_R1 = (weights_RV * is_likely_RV).sum(dim=-1, keepdim=True)
    others_R1 = (weights_RV * ~is_likely_RV).sum(dim=-1, keepdim=True)
    keep_RV = is_likely_RV == (uniforms_R1 * (likely_R1 + others_R1) < likely_R1)
    if any(draw.is_limited for draw in draws):
        top_k_R1 = indices([[draw.top_k or logits_RV.shape[1]] for draw in draws], device)
        is_limited_R1 = numbers([[draw.is_limited] for draw in draws], device, dtype=torch.bool)
        limits = _Limits(is_limited_R1, top_k_R1, top_p_R1, min_p_R1)
        keep_RV = torch.where(is_limited_R1, _are_within(limits, scaled_RV, weights_RV), keep_RV)
    return weights_RV * keep_RV


class _Limits(NamedTuple):
    is_limited_R1: torch.Tensor
    top_k_R1: torch.Tensor
    top_p_R1: torch.Tensor
    min_p_R1: torch.Tensor


def _are_within(limits: _Limits, scaled_RV: torch.Tensor, weights_RV: torch.Tensor) -> torch.Tensor:
    """Of equals the first are kept."""
    totals_R1, order_RN = weights_RV.sum(dim=-1, keepdim=True), _order(limits, scaled_RV, weights_RV)
    sorted_RN = weights_RV.gather(1, order_RN)
    are_within_RN = torch.arange(order_RN.shape[1], device=order_RN.device) < limits.top_k_R1
    sums_RN = (sorted_RN * are_within_RN).cumsum(dim=-1)
    totals_R1 = torch.where(limits.top_k_R1 < weights_RV.shape[1], sums_RN[:, -1:], totals_R1)
    are_within_RN &= (sums_RN - sorted_RN < limits.top_p_R1 * totals_R1) & (sorted_RN >= limits.min_p_R1)
    return torch.zeros_like(weights_RV, dtype=torch.bool).scatter_(1, order_RN, are_within_RN)


def _order(limits: _Limits, scaled_RV: torch.Tensor, weights_RV: torch.Tensor) -> torch.Tensor:
    """Ids from the likeliest on, (R, N): all of them, or on a CPU, which can look at numbers, as many as will do."""
    # The bits of positive floats are in their order. With the id, no two are equal, and integers are sorted faster.
    bits_RV = scaled_RV.abs().float().view(torch.int32).long()
    size, places_RV = scaled_RV.shape[1], (bits_RV << 32) + torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    if scaled_RV.device.type == "cpu" and size > LIKELY:
        order_RN = places_RV.topk(LIKELY, largest=False).indices
        likeliest_RN = weights_RV.gather(1, order_RN)
        is_sum_there_R1 = likeliest_RN.sum(dim=-1, keepdim=True) >= limits.top_p_R1 * weights_RV.sum(dim=-1, keepdim=True)
        others_do_not_count_R1 = (limits.top_k_R1 >= size) & (is_sum_there_R1 | (likeliest_RN[:, -1:] < limits.min_p_R1))
        if bool((~limits.is_limited_R1 | (limits.top_k_R1 <= LIKELY) | others_do_not_count_R1).all()):
            return order_RN
    return places_RV.argsort(dim=-1)


def uniforms_of(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """In (0, 1), float64: one for each key and id, the same whichever others are asked for.

    The key plus the id's multiple of an odd number, mixed as in SplitMix64 (Steele, Lea, Flood 2014, "Fast Splittable
    Pseudorandom Number Generators").
    """
    states = ids * signed(GOLDEN) + keys
    for shift, factor in MIXING:
        states = (states ^ _shifted(states, shift)) * signed(factor)
    states = states ^ _shifted(states, LAST_SHIFT)
    return (_shifted(states, 11).double() + 0.5) * 2.0**-53


def _shifted(states: torch.Tensor, shift: int) -> torch.Tensor:
    """To the right; zeros come from the left."""
    return (states >> shift) & ((1 << (64 - shift)) - 1)


def signed(bits: int) -> int:
    """The same 64 bits as torch's integers count them."""
    return bits - (1 << 64) if bits >> 63 else bits


class CompiledDraw:
    """In float32, on all threads. Raises NotImplementedError where there is no such kernel, ImportError without a compiler."""

    def __init__(self) -> None:
        from asyncpipe_workers.compiled.compiler import compiled
        from asyncpipe_workers.compiled.draw import DrawRows, scratch_bytes

        self._kernel = compiled(DrawRows, LIKELY_ABOVE)
        self._scratch_bytes = functools.partial(scratch_bytes, lanes=self._kernel.lanes)

    def __call__(self, logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        if logits_RV.stride(-1) != 1:
            logits_RV = logits_RV.contiguous()
        size, num_threads = logits_RV.shape[1], min(torch.get_num_threads(), len(draws))
        limits = [(draw.temperature, draw.uniform, draw.top_p, draw.min_p) for draw in draws]
        numbers_R4 = torch.tensor(limits, dtype=torch.float64)
        wholes_R2 = torch.tensor([(min(draw.top_k, size), draw.key) for draw in draws])
        drawn_R = torch.empty(len(draws), dtype=torch.long)
        scratch = torch.empty(self._scratch_bytes(size, num_threads=num_threads), dtype=torch.uint8)
        tensors = (logits_RV, numbers_R4, wholes_R2, drawn_R, scratch)
        self._kernel(tensors, (len(draws), size, logits_RV.stride(0)), num_threads)
        return drawn_R


@functools.cache
def compiled_draw() -> Callable[[torch.Tensor, Sequence[Draw]], torch.Tensor] | None:
    """None where torch has to do it."""
    with contextlib.suppress(ImportError, NotImplementedError):
        return CompiledDraw()
    return None
