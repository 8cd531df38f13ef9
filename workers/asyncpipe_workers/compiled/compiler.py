"""From instructions to functions of this process, for its processor."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from llvmlite import binding as llvm
from llvmlite import ir

from asyncpipe_workers.compiled.kernel import OPENMP, WORK, Kernel
from asyncpipe_workers.tape import Call, recorded_tape

SPEED_LEVEL = 2


class CompiledModule:
    """Functions of this process."""

    def __init__(self, module: ir.Module) -> None:
        machine = _machine()
        parsed = llvm.parse_assembly(str(module))
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=SPEED_LEVEL))
        passes.getModulePassManager().run(parsed, passes)
        self._engine = llvm.create_mcjit_compiler(parsed, machine)  # the functions live as long as it does
        self._engine.finalize_object()

    def address(self, function: str) -> int:
        found: int = self._engine.get_function_address(function)
        return found


class CompiledKernel:
    """May be called from several threads at once."""

    def __init__(self, kernel: Kernel) -> None:
        self.lanes = kernel.lanes
        self._module = CompiledModule(kernel.module)
        self._work = self._module.address(WORK)
        self._arguments = ctypes.c_int64 * (len(kernel.arguments) + 1)

    def __call__(self, tensors: Sequence[torch.Tensor], counts: Sequence[int], num_threads: int | None = None) -> None:
        """On as many threads as torch computes with, if nothing is said."""
        num_threads = num_threads or torch.get_num_threads()
        addresses = [tensor.data_ptr() for tensor in tensors]
        arguments = self._arguments(*addresses, *counts)
        _run_on_threads()(self._work, arguments, num_threads, 0)
        if (tape := recorded_tape()) is not None:
            tape.add(Call(self._work, arguments, num_threads), keep=tensors)


@functools.cache
def _run_on_threads() -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
        ("GOMP_parallel", ctypes.CDLL(None))
    )


def compiled(kind: type[Kernel], *arguments: Hashable) -> CompiledKernel:
    """For this processor's widest vectors, which are the kind's first argument. Takes a quarter of a second the first time.

    Raises NotImplementedError where `lanes_of` does.
    """
    return _compiled(kind, lanes_of(kind), *arguments)


@functools.cache
def _compiled(kind: type[Kernel], *arguments: Any) -> CompiledKernel:
    return CompiledKernel(kind(*arguments))


def lanes_of(kind: type[Kernel]) -> int:
    """Of the widest vectors in which this machine can compute a kernel. Raises NotImplementedError if in none."""
    process = ctypes.CDLL(None)
    if platform.machine() != "x86_64" or not all(hasattr(process, name) for name in OPENMP):
        raise NotImplementedError("kernels are compiled for x86-64 processors and GNU's OpenMP only")
    features = host_features()
    for lanes in sorted(kind.features, reverse=True):
        if all(features.get(name) for name in kind.features[lanes]):
            return lanes
    raise NotImplementedError(f"this processor lacks what {kind.__name__} needs, one of {[*kind.features.values()]}")


@functools.cache
def host_features() -> Mapping[str, bool]:
    return dict(llvm.get_host_cpu_features())


def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    features["prefer-256-bit"] = False  # vectors of 512 bits are meant where they are written
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=SPEED_LEVEL)
