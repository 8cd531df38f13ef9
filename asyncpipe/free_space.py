"""How much memory and disk may still be used: what the kernel and the container allow."""

from __future__ import annotations

import shutil
from pathlib import Path

from asyncpipe.control_group import group_settings

MEMINFO = Path("/proc/meminfo")


def free_memory_bytes() -> int | None:
    """Of this machine, or of this control group where that has less; None where the system does not say.

    Files that programs have mapped are not free, though the kernel could do without: they are a model's weights.
    """
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        available = max(_num_bytes(fields["MemAvailable"]) - _num_bytes(fields.get("Mapped", "0 kB")), 0)
    except (OSError, KeyError):
        return None
    return min(available, _cgroup_room(available))


def free_disk_bytes(directory: Path) -> int:
    """Of the file system that `directory` is on, or will be when it is made."""
    whole = directory.absolute()
    return shutil.disk_usage(next(parent for parent in (whole, *whole.parents) if parent.exists())).free


def _num_bytes(text: str) -> int:
    """Of "12 kB"."""
    return int(text.split()[0]) * 1024


def _cgroup_room(otherwise: int) -> int:
    """What is left of the limits of this process's control group and of those around it."""
    limits = group_settings("memory.max", "memory.current")
    rooms = [max(int(limit) - int(used), 0) for limit, used in limits if limit.isdigit() and used.isdigit()]
    return min(rooms, default=otherwise)
