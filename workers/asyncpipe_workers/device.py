"""What a worker can say of its device before it has loaded anything."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

from asyncpipe.errors import Invalid
from asyncpipe.simulation import is_simulation


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    device: str
    name: str = ""  # as its maker calls it
    card: str = ""  # a GPU's UUID
    memory_bytes: int = 0  # in all


def look_at(device: str) -> DeviceFacts:
    """Raises Invalid when it is not there. Takes seconds: torch is imported, here and not when a stage is to be loaded."""
    if is_simulation(device):
        return DeviceFacts(device)
    importlib.import_module("asyncpipe_workers.stage_model")
    return _cuda_facts(device) if device.startswith("cuda") else DeviceFacts(device, memory_bytes=_host_bytes())


def _cuda_facts(device: str) -> DeviceFacts:
    import torch

    if not torch.cuda.is_available():
        raise Invalid(f"--device {device}: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    try:
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, ValueError):
        count = torch.cuda.device_count()
        raise Invalid(f"--device {device}: there are {count} CUDA devices here, cuda:0 to cuda:{count - 1}") from None
    return DeviceFacts(device, properties.name, str(getattr(properties, "uuid", "")), properties.total_memory)


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
