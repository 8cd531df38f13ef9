"""Matrix products in the form that this machine computes fastest.

A weight that stays is given its form once, when it is loaded: as it is, or packed by oneDNN for its own kernels. Which is
quickest differs between processors by up to three times, either way, so it is measured for each shape, in some milliseconds,
and remembered on disk. Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

TRIED_ROWS = (1, 8, 32, 128)
TRIALS = 4
MAX_ROWS = 512  # beyond, both forms are bound by arithmetic
MIN_GAIN = 0.9  # of a plain product's time: what is not quicker than that is not worth another form
PACKED_FOR_ROWS = 32  # oneDNN chooses the layout of a packed weight for a batch; this one does well with others too
CACHE_FILE = "kernels.json"


class ResidentLinear(Protocol):
    """y = x W^T + b, (..., I) to (..., O)."""

    num_bytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


LinearMaker = Callable[[torch.Tensor, torch.Tensor | None], ResidentLinear]
"""Of a weight (O, I) and a bias (O,). The weight is not changed; it is kept only if the form needs it as it is."""


class PlainLinear:
    """The weight as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self.num_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = project(x, self._weight)
        return y if self._bias is None else y.add_(self._bias)


class PackedLinear:
    """oneDNN's kernel on a weight in oneDNN's layout: float32 or bfloat16, on a CPU."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        self._bias = bias
        self.num_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


FLOAT_FORMS: Mapping[str, LinearMaker] = {"plain": PlainLinear, "packed": PackedLinear}


def make_float_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> ResidentLinear:
    """In the quickest form for its shape."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return PlainLinear(weight, bias)
    return FLOAT_FORMS[quickest_form(FLOAT_FORMS, tuple(weight.shape), weight.dtype)](weight, bias)


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T: (..., I) and (O, I) to (..., O)."""
    if x.ndim == 2 and 1 < len(x) <= MAX_ROWS and x.device.type == "cpu" and weight_first_is_faster(x.dtype):
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight)


@functools.cache
def weight_first_is_faster(dtype: torch.dtype) -> bool:
    """Whether (W x^T)^T beats x W^T for few rows: with some processors and libraries by half, with others not. Measured once,
    in some milliseconds."""
    with torch.inference_mode():
        x = torch.zeros(32, 1024, dtype=dtype)
        weight = torch.zeros(4096, 1024, dtype=dtype)
        return _seconds(lambda: torch.mm(weight, x.t())) < MIN_GAIN * _seconds(lambda: F.linear(x, weight))


# --- choosing ---------------------------------------------------------------------------------------------------------


def quickest_form(forms: Mapping[str, LinearMaker], shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """The name of the form that is best over small and large batches. The first one is preferred where others gain little."""
    key = f"{'|'.join(forms)} {dtype} {shape[0]}x{shape[1]} {torch.get_num_threads()} threads"
    choices = _remembered()
    if choices.get(key) not in forms:
        choices[key] = _measured(forms, shape, dtype)
        _remember(key, choices[key])
    return choices[key]


@torch.inference_mode()
def _measured(forms: Mapping[str, LinearMaker], shape: tuple[int, ...], dtype: torch.dtype) -> str:
    weight = torch.randn(shape).mul_(0.02).to(dtype)
    times: dict[str, list[float]] = {}
    for name, form in forms.items():
        with contextlib.suppress(RuntimeError, NotImplementedError):  # not on this processor, or not in this build of torch
            linear = form(weight, None)
            times[name] = [_seconds(functools.partial(linear, torch.randn(rows, shape[1]).to(dtype))) for rows in TRIED_ROWS]
    first = next(iter(times))
    relative = {
        name: statistics.geometric_mean(own / other for own, other in zip(each, times[first], strict=True))
        for name, each in times.items()
    }
    best = min(relative, key=relative.__getitem__)
    return best if relative[best] < MIN_GAIN else first


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    """The best of some trials, the first of which warms up."""
    times = []
    for _ in range(TRIALS):
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return min(times[1:])


def _cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asyncpipe" / CACHE_FILE


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
        found = json.loads(_cache_path().read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(each, dict) for each in found.values()):
            return found
    return {}


def _remember(key: str, choice: str) -> None:
    """For the next start. Where it cannot be written, that one measures again."""
    cache = _read_cache()
    cache.setdefault(_machine(), {})[key] = choice
    path = _cache_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(cache, indent=1), encoding="utf-8")
        partial.replace(path)
