"""The directory that a conversion writes: a hidden sibling of the target that becomes the target in one step, or is removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from asyncpipe.errors import Invalid
from asyncpipe_workers.convert_files import sync_directory


def check_target(target: Path, *, source: Path, overwrite: bool) -> None:
    """Raises Invalid for what must not be written to. Both paths are absolute, without links."""
    if source.is_relative_to(target):
        raise Invalid(f"{target} holds the source, {source}: choose another target")
    if not target.parent.is_dir():
        raise Invalid(f"there is no directory {target.parent} to make {target.name} in")
    if not target.exists():
        return
    if not target.is_dir():
        raise Invalid(f"{target} is a file: choose another target")
    if target.is_mount():
        raise Invalid(f"{target} is a mount point, which cannot be replaced: choose a target within it")
    if not overwrite and any(target.iterdir()):
        raise Invalid(f"{target} is not empty: choose another target, or --overwrite to replace it")
    for entry in target.iterdir():
        if entry.is_dir():
            raise Invalid(f"{target} holds a directory, {entry.name}, so it is no checkpoint: remove it yourself")


def check_space(target: Path, num_bytes: int) -> None:
    """Raises Invalid unless `num_bytes` fit on the target's disk."""
    if shutil.disk_usage(target.parent).free < num_bytes:
        raise no_space(target, num_bytes)


def no_space(target: Path, num_bytes: int) -> Invalid:
    """The error that says so, with what is free now."""
    free = shutil.disk_usage(target.parent).free
    return Invalid(f"no room for {target}: it needs {size_text(num_bytes)}, and {size_text(free)} are free")


def size_text(num_bytes: int) -> str:
    """For people."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.2f} {unit}" if unit != "bytes" else f"{num_bytes} bytes"


@contextlib.contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, removed at the end unless `commit` has made it the target.

    It is locked meanwhile: the kernel drops the lock when this process is gone, however it ends. Raises OSError.
    """
    path = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    path.mkdir()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        finally:
            os.close(fd)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def commit(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Make `partial` the target; only with `overwrite` in place of what is there.

    Signals wait. Raises OSError, and all is then as before.
    """
    sync_directory(partial)
    replaced = partial.with_name(f"{partial.name}-old")
    with _signals_blocked():
        if overwrite and target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """What conversions to `target` left whose processes were killed."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-(\d+)-[0-9a-f]{{8}}(-old)?")
    with contextlib.suppress(OSError):  # no such directory, or not ours to clean: whoever writes there says so
        for path in target.parent.iterdir():
            found = pattern.fullmatch(path.name)
            if found is not None and _is_abandoned(path, int(found[1])):
                shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path, pid: int) -> bool:
    """Nobody locks it. A process number alone says little: numbers are used again, and each container has its own."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return not _is_running(pid)
    finally:
        os.close(fd)
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
