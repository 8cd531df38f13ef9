"""One buffer for all units of weights that are on their way or in use, in the order of their use.

Units are allocated at one end and freed at the other, so that any sizes fit without gaps, but for the end of the buffer, where
a unit that does not fit begins again at the front.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass

import torch

from asyncpipe.errors import Closed, Invalid
from asyncpipe_workers.memory.disk import aligned_up

POISON = os.environ.get("ASYNCPIPE_POISON_BUFFERS", "") not in ("", "0")
POISON_BYTE = 0xFF  # not a number in every floating-point format


@dataclass(slots=True, eq=False)
class Region:
    """[start, end) of the ring; its owner is whoever allocated it, until it is freed."""

    start: int
    end: int
    is_free: bool = False

    def overlaps(self, other: Region) -> bool:
        return self.start < other.end and other.start < self.end


class Ring:
    """`buffer` is (num_bytes,) uint8. `allocate` may wait on one thread while `free` is called on another."""

    def __init__(self, buffer: torch.Tensor, *, poison: bool = POISON) -> None:
        self.buffer = buffer
        self._poison = poison
        self._regions: deque[Region] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def allocate(self, num_bytes: int) -> Region:
        """Waits for room: as long as computing on what is there takes. Raises Closed when `close` was called."""
        num_bytes = aligned_up(max(num_bytes, 1))
        if num_bytes > len(self.buffer):
            raise Invalid(f"a unit of {num_bytes} bytes in a buffer of {len(self.buffer)}")
        with self._changed:
            while (start := self._find(num_bytes)) is None:
                if self._is_closed:
                    raise Closed("the buffer of weights was closed")
                self._changed.wait(timeout=1.0)
            region = Region(start, start + num_bytes)
            self._regions.append(region)
            return region

    def bytes_of(self, region: Region) -> torch.Tensor:
        return self.buffer[region.start : region.end]

    def free(self, region: Region) -> None:
        if region.is_free:
            raise Invalid("a region of the ring was freed twice")
        if self._poison:
            self.bytes_of(region).fill_(POISON_BYTE)
        with self._changed:
            region.is_free = True
            while self._regions and self._regions[0].is_free:
                self._regions.popleft()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _find(self, num_bytes: int) -> int | None:
        if self._is_closed:
            return None
        if not self._regions:
            return 0
        first, last = self._regions[0], self._regions[-1]
        if last.start < first.start:  # it has begun again at the front
            return last.end if last.end + num_bytes <= first.start else None
        if last.end + num_bytes <= len(self.buffer):
            return last.end
        return 0 if num_bytes <= first.start else None
