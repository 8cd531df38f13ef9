"""What moved between memory tiers, how long it took, and how long the compute thread had to wait for it."""

from __future__ import annotations

import contextlib
import enum
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from asyncpipe.errors import Timeout
from asyncpipe.wire.messages import Moved, TransferReport

MAX_MOVES = 4096
TRANSFER_TIMEOUT_S = 600.0  # a disk that gives nothing for so long is broken

T = TypeVar("T")


class Cargo(enum.Enum):
    """What moves; the names are the fields of `TransferReport`."""

    WEIGHTS = "weights"
    CACHE_LOADS = "cache_loads"
    CACHE_STORES = "cache_stores"
    ACTIVATIONS = "activations"


class Move(NamedTuple):
    """One transfer, on the monotonic clock."""

    start_ns: int
    end_ns: int


@dataclass(slots=True)
class _Totals:
    num_bytes: int = 0
    busy_ns: int = 0
    wait_ns: int = 0


class TransferLog:
    """Totals for the status, and the last moves for the trace. Any thread may add."""

    def __init__(self) -> None:
        self._totals = {cargo: _Totals() for cargo in Cargo}
        self._moves: deque[Move] = deque(maxlen=MAX_MOVES)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def moving(self, cargo: Cargo, num_bytes: int) -> Iterator[None]:
        start_ns = time.monotonic_ns()
        yield
        end_ns = time.monotonic_ns()
        with self._lock:
            self._totals[cargo].num_bytes += num_bytes
            self._totals[cargo].busy_ns += end_ns - start_ns
            self._moves.append(Move(start_ns, end_ns))

    @contextlib.contextmanager
    def waiting(self, cargo: Cargo) -> Iterator[None]:
        """The compute thread can do nothing else."""
        start_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self._totals[cargo].wait_ns += time.monotonic_ns() - start_ns

    def wait(self, cargo: Cargo, future: Future[T], what: str) -> T:
        """The future's result, for the compute thread. Raises Timeout, which names what was awaited."""
        if future.done():
            return future.result()
        try:
            with self.waiting(cargo):
                return future.result(timeout=TRANSFER_TIMEOUT_S)
        except FutureTimeout:
            raise Timeout(f"{what} did not arrive within {TRANSFER_TIMEOUT_S:g} s") from None

    def report(self) -> TransferReport:
        with self._lock:
            moved = {
                cargo.value: Moved(totals.num_bytes, totals.busy_ns / 1e9, totals.wait_ns / 1e9)
                for cargo, totals in self._totals.items()
            }
        return TransferReport(**moved)

    def take_moves(self) -> list[Move]:
        """Those since the last call, at most `MAX_MOVES` of them."""
        with self._lock:
            moves = list(self._moves)
            self._moves.clear()
        return moves

    @staticmethod
    def peak_device_bytes() -> int:
        torch = sys.modules.get("torch")  # a simulated stage does without
        return torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_initialized() else 0
