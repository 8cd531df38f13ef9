"""Kernels that are compiled here for what happens to rows between products."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence

import torch

SHARED_FROM = 1 << 16  # numbers: fewer are computed sooner than another thread is woken
LANES = 16  # of the widest vectors

RowCall = Callable[[Sequence[torch.Tensor], Sequence[int]], None]
"""Takes a kernel's tensors and counts."""


def row_kernel(kind: str, x: torch.Tensor, size: int, *arguments: Hashable) -> RowCall | None:
    """The kernel of that name in compiled/rows.py or choose.py, for rows of `x` in which it computes `size` numbers after one
    another. None where torch has to do it: for other types and devices, odd sizes, numbers that lie apart, and where nothing is
    compiled."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or size % LANES or x.stride(-1) != 1:
        return None
    alone, together = _compiled(kind, *arguments)
    return alone if x.numel() < SHARED_FROM else together


@functools.cache
def _compiled(kind: str, *arguments: Hashable) -> tuple[RowCall | None, RowCall | None]:
    """For one thread, and for all."""
    with contextlib.suppress(ImportError, NotImplementedError):
        from asyncpipe_workers.compiled import choose, rows
        from asyncpipe_workers.compiled.compiler import compiled

        kernel = compiled((vars(rows) | vars(choose))[kind], *arguments)
        return functools.partial(kernel, num_threads=1), kernel
    return None, None
