"""One call for many kernels, one after the other."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from asyncpipe_workers.compiled.builder import ADDRESS, COUNT, NOTHING, WORD, Builder
from asyncpipe_workers.compiled.compiler import CompiledModule
from asyncpipe_workers.tape import Call

NAME = "chain"
RECORD = 4  # of a call: work, arguments, threads, and the place behind the arguments, which is zero at first


class Chain:
    """Whenever it is called, the calls are made; their tensors must still be there."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls  # their arguments stay where they are
        self._records = (ctypes.c_int64 * (RECORD * len(calls)))()
        for index, call in enumerate(calls):
            first = ctypes.addressof(call.arguments)
            last = first + ctypes.sizeof(call.arguments) - ctypes.sizeof(ctypes.c_int64)
            self._records[RECORD * index : RECORD * (index + 1)] = [call.work, first, call.num_threads, last]

    def __call__(self) -> None:
        _compiled()[1](self._records, len(self._calls))


@functools.cache
def _compiled() -> tuple[CompiledModule, Any]:
    compiled = CompiledModule(NAME, _instructions)
    return compiled, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(compiled.address(NAME))


def _instructions() -> ir.Module:
    module = ir.Module()
    chain = ir.Function(module, ir.FunctionType(NOTHING, [ADDRESS, COUNT]), NAME)
    b = Builder(chain.append_basic_block(), lanes=1)
    records, number = chain.args
    with b.loop(0, number) as index:
        work, arguments, threads, last = (
            b.load(b.at(records, b.plus(b.times(index, RECORD), n), COUNT), typ=of)
            for n, of in enumerate((ADDRESS, ADDRESS, COUNT, ADDRESS))
        )
        b.store(b.count(0), last)
        b.outside("GOMP_parallel", NOTHING, work, arguments, b.trunc(threads, WORD), ir.Constant(WORD, 0))
    b.ret_void()
    return module
