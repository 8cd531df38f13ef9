"""What is noted down of a computation on a CPU so that it can be done again without Python: calls of compiled kernels, and the
memory that they write to."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATION = "aten.empty."


class Call(NamedTuple):
    """Of a kernel: the address of what each thread does, its arguments (an array of 64-bit integers, the last one zero), and
    the number of threads."""

    work: int
    arguments: Any
    num_threads: int


class Choice(NamedTuple):
    """Of lists of calls, which are `CallLists` of compiled/chain.py, the one whose number a kernel writes to `number`."""

    number: int
    lists: Any


class TapeMemory:
    """What parts of a tape write to; many tapes may have the same, one at a time. It is used again by every other part: a part
    reads what the one before it has written, and nothing older."""

    def __init__(self) -> None:
        self._halves: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._part = self._num_taken = 0
        self.num_bytes = 0

    def begin_part(self) -> None:
        self._part += 1
        self.begin_again()

    def begin_again(self) -> None:
        """To write where the part has written."""
        self._num_taken = 0

    def new(self, num_bytes: int) -> torch.Tensor:
        pieces, place = self._halves[self._part % 2], self._num_taken
        self._num_taken += 1
        if place == len(pieces):
            pieces.append(torch.empty(0, dtype=torch.uint8))
        if len(pieces[place]) < num_bytes:
            self.num_bytes += num_bytes - len(pieces[place])
            pieces[place] = torch.empty(num_bytes, dtype=torch.uint8)  # tapes that have the old one keep it
        return pieces[place][:num_bytes]


class Tape:
    def __init__(self, memory: TapeMemory, *, is_dry: bool = False) -> None:
        """If it `is_dry`, calls are noted down and not made."""
        self.memory = memory
        self.is_dry = is_dry
        self.calls: list[Call | Choice] = []
        self._kept: list[Sequence[torch.Tensor]] = []

    def add(self, call: Call | Choice, *, keep: Sequence[torch.Tensor]) -> None:
        """`keep` are the tensors that its arguments are addresses of."""
        self.calls.append(call)
        self._kept.append(keep)


_current = threading.local()


def recorded_tape() -> Tape | None:
    """That which this thread records."""
    return getattr(_current, "tape", None)


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    before, _current.tape = recorded_tape(), tape
    try:
        yield
    finally:
        _current.tape = before


def new_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With any numbers in it; for what a kernel writes to."""
    tape = recorded_tape()
    if tape is None:
        return torch.empty(shape, dtype=dtype)
    return tape.memory.new(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


class OtherCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what torch computes, for that would not be done again. Views are of memory that stays."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is traced here; to say so to torch's tracer would import it, for more than a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not str(func).startswith(ALLOCATION) and not (func.is_view and _is_same_memory(result, args[0])):
            self.found.add(str(func))
        return result


def _is_same_memory(result: Any, source: Any) -> bool:
    first = result if isinstance(result, torch.Tensor) else next(iter(result), None)
    if not isinstance(first, torch.Tensor) or not isinstance(source, torch.Tensor):
        return False
    return first.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
