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

import asyncpipe
from asyncpipe.cache_dir import cache_dir

ROUNDS = 9  # in one of which nobody disturbs
MOST_BETWEEN_BYTES = 64 << 20  # more than a cache holds
MIN_GAIN = 0.9  # of the first way's time: what is not quicker than that is not worth another way
CACHE_FILE = "kernels.json"
CPU_FIELDS = ("model name", "cpu family", "model", "CPU implementer", "CPU part")  # a virtual machine may say less in its name

Call = Callable[[], torch.Tensor]


def quickest(
    what: str,
    ways: Mapping[str, Callable[[], Sequence[Call]]],
    *,
    between_bytes: int = MOST_BETWEEN_BYTES,
    min_gain: float = MIN_GAIN,
) -> str:
    """The name of the way that is best over all its calls, which are of the same work, in the same order, for each.

    The first way is preferred where others take more than `min_gain` of its time. One that raises RuntimeError or
    NotImplementedError is not there on this processor; where none is, that is a NotImplementedError. `what`, the names and the
    number of threads are what the choice is remembered by. Between two calls as many bytes are read as a model reads before it
    comes to the same weight again, which is in no cache then unless the model is small.
    """
    key = f"{'|'.join(ways)} {what} {torch.get_num_threads()} threads"
    choices = _remembered()
    if choices.get(key) not in ways:
        choices[key] = _measured(ways, between_bytes, min_gain)
        _remember(key, choices[key])
    return choices[key]


@torch.inference_mode()
def _measured(ways: Mapping[str, Callable[[], Sequence[Call]]], between_bytes: int, min_gain: float) -> str:
    there = {name: calls for name, make in ways.items() if (calls := _that_work(make))}
    if not there:
        raise NotImplementedError(f"not on this processor: {', '.join(ways)}")
    times, first = _best_times(there, between_bytes), next(iter(there))
    relative = {
        name: statistics.geometric_mean(own / other for own, other in zip(each, times[first], strict=True))
        for name, each in times.items()
    }
    best = min(relative, key=relative.__getitem__)
    return best if relative[best] < min_gain else first


def _that_work(make: Callable[[], Sequence[Call]]) -> Sequence[Call]:
    """None, where one raises that it is not there. All have been called once, to warm up."""
    with contextlib.suppress(RuntimeError, NotImplementedError):
        calls = make()
        for call in calls:
            call()
        return calls
    return ()


def _best_times(ways: Mapping[str, Sequence[Call]], between_bytes: int) -> Mapping[str, Sequence[float]]:
    """Seconds of each call. All ways take turns, so that who else is busy on this machine disturbs none more than another."""
    between = torch.ones(min(between_bytes, MOST_BETWEEN_BYTES) // torch.int64.itemsize, dtype=torch.int64)
    rounds: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, calls in ways.items():
            rounds[name].append([_seconds(call, between) for call in calls])
    return {name: [min(each) for each in zip(*times, strict=True)] for name, times in rounds.items()}


def _seconds(call: Call, between: torch.Tensor) -> float:
    between.sum()
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


@functools.cache
def _machine() -> str:
    """Processor and libraries: what was measured with others says nothing."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = {name.strip(): own.strip() for name, _, own in (line.partition(":") for line in lines)}
        processor = ", ".join(f"{name} {fields[name]}" for name in CPU_FIELDS if name in fields) or processor
    return f"{processor}, torch {torch.__version__}, asyncpipe {asyncpipe.__version__}"


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
