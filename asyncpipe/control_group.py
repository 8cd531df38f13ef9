"""The control group (version 2) that this process is in, as a container's limits are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def group_settings(name: str) -> Iterator[str]:
    """What the file `name` says in this process's group and in those around it, innermost first; nothing where it is not."""
    try:
        line = next(line for line in OWN_GROUP.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    group = CGROUP / line.removeprefix("0::").lstrip("/")
    for directory in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):
            yield (directory / name).read_text(encoding="ascii").strip()
        if directory == CGROUP:
            return
