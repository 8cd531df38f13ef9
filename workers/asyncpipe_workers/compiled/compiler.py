"""From instructions to functions of this process, for its processor."""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import torch
from llvmlite import binding as llvm

from asyncpipe_workers.compiled.products import ADDRESSES, COUNTS, ENTRY, OPENMP, FloatProduct, Product

SPEED_LEVEL = 2

# What vectors of so many lanes need.
FLOAT_FEATURES: dict[int, list[str]] = {16: ["avx512f"], 8: ["avx2", "fma"]}
INTEGER_FEATURES: dict[int, list[str]] = {16: ["avx512f", "avx512bw", "avx512vnni"], 8: ["avx2", "fma", "avxvnni"]}


def lanes_of(kind: type[Product]) -> int:
    """Of the widest vectors in which this machine can compute a product. Raises NotImplementedError if in none."""
    if platform.machine() not in ("x86_64", "AMD64") or not all(hasattr(ctypes.CDLL(None), name) for name in OPENMP):
        raise NotImplementedError("products are compiled for x86-64 processors and GNU's OpenMP only")
    features = llvm.get_host_cpu_features()
    widths = FLOAT_FEATURES if issubclass(kind, FloatProduct) else INTEGER_FEATURES
    for lanes in sorted(widths, reverse=True):
        if all(features.get(name) for name in widths[lanes]):
            return lanes
    raise NotImplementedError(f"this processor lacks what {kind.__name__} needs: one of {', '.join(map(str, widths.values()))}")


class CompiledProduct:
    """Of one kind of weights. May be called from several threads at once."""

    def __init__(self, product: Product) -> None:
        self.panel_size = product.panel_size
        machine = _machine()
        module = llvm.parse_assembly(str(product.module))
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=SPEED_LEVEL))
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, machine)  # the function lives as long as it does
        self._engine.finalize_object()
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(ADDRESSES + COUNTS))
        self._function: Any = function(self._engine.get_function_address(ENTRY))

    def __call__(self, x: torch.Tensor, y: torch.Tensor, *others: torch.Tensor) -> None:
        """Writes `y` (R, O), of `x` (R, I). All are contiguous, and lie as `ADDRESSES` says."""
        self._function(*[each.data_ptr() for each in (x, y, *others)], *x.shape, y.shape[1], torch.get_num_threads())


def compiled(kind: type[Product], group_size: int | None = None) -> CompiledProduct:
    """Takes a quarter of a second the first time. Raises NotImplementedError where `lanes_of` does."""
    return _compiled(kind, lanes_of(kind), group_size)


@functools.cache
def _compiled(kind: type[Product], lanes: int, group_size: int | None) -> CompiledProduct:
    return CompiledProduct(kind(lanes, group_size))


def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    features["prefer-256-bit"] = False  # vectors of 512 bits are meant where they are written
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=SPEED_LEVEL)
