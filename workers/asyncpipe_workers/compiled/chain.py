"""One call for many kernels, one after the other."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from asyncpipe_workers.compiled.builder import ADDRESS, COUNT, NOTHING, WORD, Builder
from asyncpipe_workers.compiled.compiler import CompiledModule
from asyncpipe_workers.tape import Call, Choice, Tape, recorded_tape

NAME = "chain"

RECORD = 4
"""Numbers. Of a call: work, arguments, threads, and the place behind the arguments, which is zero at first. Of a choice: zero,
the place of the number that is chosen, the calls of each list, and the records of all lists."""


class Chain:
    """Whenever it is called, the calls are made; their tensors must still be there."""

    def __init__(self, calls: Sequence[Call | Choice]) -> None:
        self._calls = calls  # their arguments stay where they are
        self._records = _records_of(calls)

    def __call__(self) -> None:
        _compiled()[1](self._records, len(self._calls))


class CallLists:
    """Equally many calls each, of which one list is made at a time."""

    def __init__(self, tapes: Sequence[Tape]) -> None:
        """That the calls are on."""
        self._tapes = tapes
        self.length = len(tapes[0].calls)
        self.records = _records_of([call for tape in tapes for call in tape.calls])

    def __call__(self, number: torch.Tensor) -> None:
        """Make the calls of the list whose number (int64) is there."""
        choice = Choice(number.data_ptr(), self)
        Chain([choice])()
        if (tape := recorded_tape()) is not None:
            tape.add(choice, keep=[number])


def _records_of(calls: Sequence[Call | Choice]) -> Any:
    numbers = [number for call in calls for number in (_of_choice(call) if isinstance(call, Choice) else _of_call(call))]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _of_call(call: Call) -> Sequence[int]:
    first = ctypes.addressof(call.arguments)
    last = first + ctypes.sizeof(call.arguments) - ctypes.sizeof(ctypes.c_int64)
    return [call.work, first, call.num_threads, last]


def _of_choice(choice: Choice) -> Sequence[int]:
    return [0, choice.number, choice.lists.length, ctypes.addressof(choice.lists.records)]


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
        work, arguments, count, last = (
            b.load(b.at(records, b.plus(b.times(index, RECORD), n), COUNT), typ=of)
            for n, of in enumerate((COUNT, ADDRESS, COUNT, ADDRESS))
        )
        with b.if_else(b.icmp_signed("==", work, b.count(0))) as (choice, call):
            with choice:
                chosen = b.load(arguments, typ=COUNT)
                b.call(chain, [b.at(last, b.times(chosen, count, RECORD), COUNT), count])
            with call:
                b.store(b.count(0), last)
                threads = b.trunc(count, WORD)
                b.outside("GOMP_parallel", NOTHING, b.inttoptr(work, ADDRESS), arguments, threads, ir.Constant(WORD, 0))
    b.ret_void()
    return module
