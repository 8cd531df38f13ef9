"""The control group (version 2) that this process is in, as a container's limits are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def group_settings(*names: str) -> Iterator[tuple[str, ...]]:
    """What the files `names` say in this process's group and in each around it, innermost first; nothing of a group that lacks
    one of them."""
    try:
        line = next(line for line in OWN_GROUP.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    group = CGROUP / line.removeprefix("0::").lstrip("/")
    for directory in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):
            yield tuple((directory / name).read_text(encoding="ascii").strip() for name in names)
        if directory == CGROUP:
            return
