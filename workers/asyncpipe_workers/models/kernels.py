"""Which form of a matrix product this machine computes faster."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

TRIED_ROWS = 32
TRIED_SIZE = 1024
TRIALS = 5
MAX_ROWS = 512  # beyond, both forms are bound by arithmetic


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T: (..., in) and (out, in) to (..., out)."""
    if x.ndim == 2 and 1 < len(x) <= MAX_ROWS and x.device.type == "cpu" and weight_first_is_faster(x.dtype):
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight)


@functools.cache
def weight_first_is_faster(dtype: torch.dtype) -> bool:
    """Whether (W x^T)^T beats x W^T for few rows: with some processors and libraries by half, with others not. Measured once,
    in some milliseconds."""
    with torch.inference_mode():
        x = torch.zeros(TRIED_ROWS, TRIED_SIZE, dtype=dtype)
        weight = torch.zeros(4 * TRIED_SIZE, TRIED_SIZE, dtype=dtype)
        return _seconds(lambda: torch.mm(weight, x.t())) < 0.9 * _seconds(lambda: F.linear(x, weight))


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    """The best of some trials, the first of which warms up."""
    times = []
    for _ in range(TRIALS):
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return min(times[1:])
