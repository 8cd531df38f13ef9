"""From instructions to functions of this process, for its processor."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from llvmlite import binding as llvm
from llvmlite import ir

from asyncpipe_workers.compiled.kept_code import kept_code
from asyncpipe_workers.compiled.kernel import OPENMP, WORK, Kernel
from asyncpipe_workers.tape import Call, recorded_tape

SPEED_LEVEL = 2


class CompiledModule:
    """Functions of this process. `what` says which, and they are compiled once on this machine."""

    def __init__(self, what: str, write: Callable[[], ir.Module]) -> None:
        code = kept_code(what, lambda: _machine_code(write()))
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())  # the functions live as long as it does
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, function: str) -> int:
        found: int = self._engine.get_function_address(function)
        return found


def _machine_code(module: ir.Module) -> bytes:
    """An object file."""
    machine = _machine()
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=SPEED_LEVEL))
    passes.getModulePassManager().run(parsed, passes)
    code: bytes = machine.emit_object(parsed)
    return code


class CompiledKernel:
    """May be called from several threads at once."""

    def __init__(self, kind: type[Kernel], lanes: int, *arguments: Any) -> None:
        self.kind = kind
        self.lanes = lanes
        what = f"{kind.__module__}.{kind.__name__}{(lanes, *arguments)}"
        self._module = CompiledModule(what, lambda: kind(lanes, *arguments).module)
        self._work = self._module.address(WORK)

    def __call__(self, tensors: Sequence[torch.Tensor], counts: Sequence[int], num_threads: int | None = None) -> None:
        """On as many threads as torch computes with, if nothing is said."""
        num_threads = num_threads or torch.get_num_threads()
        numbers = [*[tensor.data_ptr() for tensor in tensors], *counts]
        arguments = _array_of(len(numbers) + 1)(*numbers)
        tape = recorded_tape()
        if tape is None or not tape.is_dry:
            _run_on_threads()(self._work, arguments, num_threads, 0)
        if tape is not None:
            tape.add(Call(self._work, arguments, num_threads), keep=tensors)


@functools.cache
def _array_of(length: int) -> Any:
    return ctypes.c_int64 * length


@functools.cache
def _run_on_threads() -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
        ("GOMP_parallel", ctypes.CDLL(None))
    )


def compiled(kind: type[Kernel], *arguments: Hashable) -> CompiledKernel:
    """For this processor's widest vectors, which are the kind's first argument. Takes up to half a second the first time on a
    machine.

    Raises NotImplementedError where `lanes_of` does.
    """
    return _compiled(kind, lanes_of(kind), *arguments)


def first_compiled(kinds: Sequence[type[Kernel]], *arguments: Hashable) -> CompiledKernel:
    """Of the first of these kinds that this processor can compute. Raises NotImplementedError if it can none of them."""
    *preferred, last = kinds
    for kind in preferred:
        with contextlib.suppress(NotImplementedError):
            return compiled(kind, *arguments)
    return compiled(last, *arguments)


@functools.cache
def _compiled(kind: type[Kernel], *arguments: Any) -> CompiledKernel:
    return CompiledKernel(kind, *arguments)


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
