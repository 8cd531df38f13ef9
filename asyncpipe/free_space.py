"""How much memory and disk may still be used: what the kernel and the container allow."""

from __future__ import annotations

import shutil
from pathlib import Path

from asyncpipe.control_group import group_settings

MEMINFO = Path("/proc/meminfo")


def free_memory_bytes() -> int | None:
    """Of this machine, or of this control group where that has less; None where the system does not say."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min(available, _cgroup_room(available))


def free_disk_bytes(directory: Path) -> int:
    """Of the file system that `directory` is on, or will be when it is made."""
    whole = directory.absolute()
    return shutil.disk_usage(next(parent for parent in (whole, *whole.parents) if parent.exists())).free


def _cgroup_room(otherwise: int) -> int:
    """What is left of the limits of this process's control group and of those around it."""
    limits = group_settings("memory.max", "memory.current")
    rooms = [max(int(limit) - int(used), 0) for limit, used in limits if limit.isdigit() and used.isdigit()]
    return min(rooms, default=otherwise)
