"""Small integers on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def indices(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """As int64, of the shape of `values`. To a GPU they go through pinned memory, and nobody waits for them."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.long, device=device)
    return torch.tensor(values, dtype=torch.long, pin_memory=True).to(device, non_blocking=True)
