"""The quickest of several ways to compute the same, on this machine.

Which that is differs between processors by up to three times, either way. So it is measured, in a part of a second, and
remembered on disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from asyncpipe.cache_dir import cache_dir

MIN_TRIALS = 5  # one of which nobody disturbs
MAX_TRIALS = 100
TRIAL_S = 0.05  # of trials of one call, where there are neither too few nor too many
MIN_GAIN = 0.9  # of the first way's time: what is not quicker than that is not worth another way
CACHE_FILE = "kernels.json"

Call = Callable[[], torch.Tensor]


def quickest(what: str, ways: Mapping[str, Callable[[], Sequence[Call]]]) -> str:
    """The name of the way that is best over all its calls, which are of the same work, in the same order, for each.

    The first way is preferred where others gain little. One that raises RuntimeError or NotImplementedError is not there on
    this processor; where none is, that is a NotImplementedError. `what`, the names and the number of threads are what the
    choice is remembered by.
    """
    key = f"{'|'.join(ways)} {what} {torch.get_num_threads()} threads"
    choices = _remembered()
    if choices.get(key) not in ways:
        choices[key] = _measured(ways)
        _remember(key, choices[key])
    return choices[key]


@torch.inference_mode()
def _measured(ways: Mapping[str, Callable[[], Sequence[Call]]]) -> str:
    times: dict[str, list[float]] = {}
    for name, calls in ways.items():
        with contextlib.suppress(RuntimeError, NotImplementedError):
            times[name] = [_seconds(call) for call in calls()]
    if not times:
        raise NotImplementedError(f"not on this processor: {', '.join(ways)}")
    first = next(iter(times))
    relative = {
        name: statistics.geometric_mean(own / other for own, other in zip(each, times[first], strict=True))
        for name, each in times.items()
    }
    best = min(relative, key=relative.__getitem__)
    return best if relative[best] < MIN_GAIN else first


def _seconds(call: Call) -> float:
    """The best of some trials, after one that warms up."""
    call()
    times: list[float] = []
    while len(times) < MIN_TRIALS or (sum(times) < TRIAL_S and len(times) < MAX_TRIALS):
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return min(times)


@functools.cache
def _machine() -> str:
    """Processor and library: what was measured with others says nothing."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{processor}, torch {torch.__version__}"


@functools.cache
def _remembered() -> dict[str, str]:
    return _read_cache().get(_machine(), {})


def _read_cache() -> dict[str, dict[str, str]]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((cache_dir() / CACHE_FILE).read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(each, dict) for each in found.values()):
            return found
    return {}


def _remember(key: str, choice: str) -> None:
    """For the next start. Where it cannot be written, that one measures again."""
    cache = _read_cache()
    cache.setdefault(_machine(), {})[key] = choice
    path = cache_dir() / CACHE_FILE
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(cache, indent=1), encoding="utf-8")
        partial.replace(path)
