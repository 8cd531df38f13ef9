"""What kernels have in common: a function that takes addresses and counts, and that all threads of OpenMP compute together, as
they compute what torch asks them to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from llvmlite import ir

from asyncpipe_workers.compiled.builder import ADDRESS, COUNT, NOTHING, WORD, Builder

ENTRY = "entry"
OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

# What vectors of so many 32-bit lanes need of a processor: for floats, for float16 or sums of bytes' products as well.
FLOAT_FEATURES: dict[int, list[str]] = {16: ["avx512f"], 8: ["avx2", "fma"]}
HALF_FEATURES: dict[int, list[str]] = {16: ["avx512f"], 8: ["avx2", "fma", "f16c"]}
BYTE_FEATURES: dict[int, list[str]] = {16: ["avx512f", "avx512bw", "avx512vnni"], 8: ["avx2", "fma", "avxvnni"]}


class Kernel(ABC):
    """A module whose function `ENTRY` takes addresses, counts and the number of threads, 64 bits each. `build` says what each
    thread does."""

    features: ClassVar[dict[int, list[str]]] = FLOAT_FEATURES

    def __init__(self, lanes: int, addresses: Sequence[str], counts: Sequence[str]) -> None:
        """Vectors are of `lanes` 32-bit lanes."""
        self.lanes = lanes
        self.num_arguments = len(addresses) + len(counts) + 1
        self.module = ir.Module()
        work = ir.Function(self.module, ir.FunctionType(NOTHING, [ADDRESS]), "work")
        self._build_entry(work)
        b = self.b = Builder(work.append_basic_block(), lanes)
        types = dict.fromkeys(addresses, ADDRESS) | dict.fromkeys(counts, COUNT)
        self.arguments: dict[str, ir.Value] = {
            name: b.load(b.at(work.args[0], place, COUNT), typ=of) for place, (name, of) in enumerate(types.items())
        }
        self._taken = b.at(work.args[0], self.num_arguments, COUNT)  # how much of what is `shared`; behind the arguments
        self.build()
        b.ret_void()

    @abstractmethod
    def build(self) -> None: ...

    def thread(self) -> ir.Value:
        """Its number."""
        return self.b.zext(self.b.outside("omp_get_thread_num", WORD), COUNT)

    @contextmanager
    def own_share(self, total: ir.Value) -> Iterator[ir.Value]:
        """A loop over a thread's part of 0 to `total`."""
        b = self.b
        thread, threads = self.thread(), b.zext(b.outside("omp_get_num_threads", WORD), COUNT)
        bounds = [b.over(b.times(total, b.plus(thread, n)), threads) for n in range(2)]
        with b.loop(*bounds) as index:
            yield index

    @contextmanager
    def shared(self, total: ir.Value) -> Iterator[ir.Value]:
        """A loop over what is left of 0 to `total`, one by one: a thread that others hold up leaves more to the rest. Once in a
        kernel."""
        b = self.b
        with b.endless_loop() as leave:
            index = b.atomic_rmw("add", self._taken, b.count(1), "monotonic")
            leave(b.icmp_signed(">=", index, total))
            yield index

    def _build_entry(self, work: ir.Function) -> None:
        """Keeps the arguments in memory, where all threads find them."""
        entry = ir.Function(self.module, ir.FunctionType(NOTHING, [COUNT] * self.num_arguments), ENTRY)
        b = Builder(entry.append_basic_block(), self.lanes)
        kept = b.alloca(COUNT, self.num_arguments + 1)
        for place, value in enumerate([*entry.args, ir.Constant(COUNT, 0)]):
            b.store(value, b.at(kept, place, COUNT))
        parallel = ir.FunctionType(NOTHING, [ADDRESS, ADDRESS, WORD, WORD])
        run_on_threads = ir.Function(self.module, parallel, "GOMP_parallel")
        b.call(run_on_threads, [work, kept, b.trunc(entry.args[-1], WORD), ir.Constant(WORD, 0)])
        b.ret_void()
