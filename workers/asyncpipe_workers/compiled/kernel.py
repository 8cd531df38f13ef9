"""What kernels have in common: a function that takes addresses and counts, and that all threads of OpenMP compute together, as
they compute what torch asks them to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from llvmlite import ir

from asyncpipe_workers.compiled.builder import ADDRESS, COUNT, NOTHING, WORD, Builder

WORK = "work"
OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

# What vectors of so many 32-bit lanes need of a processor: for floats; for float16, or sums of products of bytes, or of 16 bits
# each, as well.
FLOAT_FEATURES: dict[int, list[str]] = {16: ["avx512f"], 8: ["avx2", "fma"]}
HALF_FEATURES: dict[int, list[str]] = {16: ["avx512f"], 8: ["avx2", "fma", "f16c"]}
BYTE_FEATURES: dict[int, list[str]] = {16: ["avx512f", "avx512bw", "avx512vnni"], 8: ["avx2", "fma", "avxvnni"]}
WORD_FEATURES: dict[int, list[str]] = {16: ["avx512f", "avx512bw"], 8: ["avx2", "fma"]}


class Kernel(ABC):
    """A module whose function `WORK` is what each thread does, as `build` says. It finds its arguments, addresses and then
    counts, 64 bits each, where its own argument points to, and behind them a number that is zero at first."""

    features: ClassVar[dict[int, list[str]]] = FLOAT_FEATURES
    multiplies_bytes: ClassVar[bool] = True  # or 16 bits, where there is no instruction for bytes

    def __init__(self, lanes: int, addresses: Sequence[str], counts: Sequence[str]) -> None:
        """Vectors are of `lanes` 32-bit lanes."""
        self.lanes = lanes
        self.module = ir.Module()
        work = ir.Function(self.module, ir.FunctionType(NOTHING, [ADDRESS]), WORK)
        b = self.b = Builder(work.append_basic_block(), lanes, multiplies_bytes=self.multiplies_bytes)
        types = dict.fromkeys(addresses, ADDRESS) | dict.fromkeys(counts, COUNT)
        self.arguments: dict[str, ir.Value] = {
            name: b.load(b.at(work.args[0], place, COUNT), typ=of) for place, (name, of) in enumerate(types.items())
        }
        self._taken = b.at(work.args[0], len(types), COUNT)  # how much of what is `shared`
        self.build()
        b.ret_void()

    @abstractmethod
    def build(self) -> None: ...

    def thread(self) -> ir.Value:
        """Its number."""
        return self.b.zext(self.b.outside("omp_get_thread_num", WORD), COUNT)

    def num_threads(self) -> ir.Value:
        return self.b.zext(self.b.outside("omp_get_num_threads", WORD), COUNT)

    def wait_for_all(self) -> None:
        """No thread goes on before each has come here."""
        self.b.outside("GOMP_barrier", NOTHING)

    @contextmanager
    def own_share(self, total: ir.Value) -> Iterator[ir.Value]:
        """A loop over a thread's part of 0 to `total`."""
        b, thread, threads = self.b, self.thread(), self.num_threads()
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
