"""A ceiling on the memory of a process and its children, page cache included: a control group of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from asyncpipe.control_group import CGROUP


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[Path | None]:
    """A control group for `join`; None where none can be made (no root, no controller): then nothing is limited."""
    group = _make_group(num_bytes)
    try:
        yield group
    finally:
        if group is not None:
            with contextlib.suppress(OSError):
                group.rmdir()


def join(group: Path) -> None:
    """This process, and the children that it starts from now on."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def leave(group: Path) -> None:
    """Back to the group's parent; children that were started meanwhile stay."""
    (group.parent / "cgroup.procs").write_text(str(os.getpid()))


def _make_group(num_bytes: int) -> Path | None:
    """Version 1 has a tree of its own for memory, version 2 has one for everything."""
    name = f"asyncpipe-limit-{secrets.token_hex(4)}"
    for parent, limit in ((CGROUP / "memory", "memory.limit_in_bytes"), (CGROUP, "memory.max")):
        group = parent / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(num_bytes))
            return group
        except OSError:
            group.rmdir()
    return None
