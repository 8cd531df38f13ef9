"""How much memory of a device may still be used."""

from __future__ import annotations

import torch

from asyncpipe.free_space import free_memory_bytes


def available_bytes(device: torch.device) -> int:
    """Raises OSError where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    free_bytes = free_memory_bytes()
    if free_bytes is None:
        raise OSError("the system does not say how much memory is free")
    return free_bytes
