"""How the C libraries below torch wait and keep memory. Set from within, for workers are started in many ways."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

# Turns (a tenth of a millisecond) that a compute thread waits for the others before it sleeps. libgomp's own default is
# milliseconds, in which a thread that spins keeps off the core the one it waits for, when other programs need that core too.
SPIN_COUNT = "2500"


class _Setting(NamedTuple):
    """Of glibc's mallopt, and the variable that says the same."""

    number: int
    variable: str


TRIM_THRESHOLD = _Setting(-1, "MALLOC_TRIM_THRESHOLD_")
MMAP_THRESHOLD = _Setting(-3, "MALLOC_MMAP_THRESHOLD_")
ARENA_MAX = _Setting(-8, "MALLOC_ARENA_MAX")

MOST_MAPPED_BYTES = 32 << 20  # the greatest there is
KEPT_BYTES = 256 << 20  # at the end of the heap


def prepare_c_runtime(env: MutableMapping[str, str] = os.environ) -> None:
    """At the start of a process, before libgomp is loaded and other threads have memory. What `env` says is respected."""
    if "OMP_WAIT_POLICY" not in env:
        env.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    _set(ARENA_MAX, 1, env)


def keep_freed_memory(env: Mapping[str, str] = os.environ) -> None:
    """What one layer has freed, the next one gets; malloc would give it back, and have it faulted in again, page by page."""
    _set(MMAP_THRESHOLD, MOST_MAPPED_BYTES, env)
    _set(TRIM_THRESHOLD, KEPT_BYTES, env)


def _set(setting: _Setting, value: int, env: Mapping[str, str]) -> None:
    if setting.variable in env or "glibc.malloc" in env.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(setting.number, value)
