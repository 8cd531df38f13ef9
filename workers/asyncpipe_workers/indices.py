"""Small tensors on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def indices(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """As int64, of the shape of `values`."""
    return numbers(values, device, dtype=torch.long)


def numbers(values: Sequence[Any], device: torch.device, *, dtype: torch.dtype) -> torch.Tensor:
    """Of the shape of `values`. To a GPU they go through pinned memory, and nobody waits for them."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
