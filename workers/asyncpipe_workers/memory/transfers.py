"""What moved between memory tiers, how long it took, and how long the compute thread had to wait for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import NamedTuple, TypeVar

from asyncpipe.errors import Timeout

MAX_MOVES = 4096
TRANSFER_TIMEOUT_S = 600.0  # a disk that gives nothing for so long is broken

T = TypeVar("T")


class Move(NamedTuple):
    """One transfer, on the monotonic clock."""

    start_ns: int
    end_ns: int
    num_bytes: int


class TransferLog:
    """Counts for the status, and the last moves for the trace. Any thread may add."""

    def __init__(self) -> None:
        self.wait_ns = 0
        self.num_bytes = 0
        self._moves: deque[Move] = deque(maxlen=MAX_MOVES)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def moving(self, num_bytes: int) -> Iterator[None]:
        start_ns = time.monotonic_ns()
        yield
        with self._lock:
            self.num_bytes += num_bytes
            self._moves.append(Move(start_ns, time.monotonic_ns(), num_bytes))

    def wait(self, future: Future[T], what: str) -> T:
        """The future's result, for the compute thread. Raises Timeout, which names what was awaited."""
        if future.done():
            return future.result()
        start_ns = time.monotonic_ns()
        try:
            return future.result(timeout=TRANSFER_TIMEOUT_S)
        except FutureTimeout:
            raise Timeout(f"{what} did not arrive within {TRANSFER_TIMEOUT_S:g} s") from None
        finally:
            self.wait_ns += time.monotonic_ns() - start_ns

    def take_moves(self) -> list[Move]:
        """Those since the last call, at most `MAX_MOVES` of them."""
        with self._lock:
            moves = list(self._moves)
            self._moves.clear()
        return moves
