"""Which lines of a batch are done, and in which order they come out."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from asyncpipe.errors import Busy, Invalid

T = TypeVar("T")


class LineSet:
    """Line numbers, a bit each: ten million lines take 1.25 MB."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __contains__(self, line: int) -> bool:
        byte, bit = divmod(line, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)

    def add(self, line: int) -> None:
        if line in self:
            return
        byte, bit = divmod(line, 8)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        self._bits[byte] |= 1 << bit
        self._len += 1


class Reorder(Generic[T]):
    """Puts what finishes in any order back into the order in which it was begun.

    At most `capacity` lines are between `expect` and their release, so that the others do not pile up behind a slow one.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._order: deque[int] = deque()
        self._unfinished: set[int] = set()
        self._held: dict[int, T] = {}

    @property
    def num_held(self) -> int:
        """Payloads that wait for an earlier line."""
        return len(self._held)

    @property
    def has_room(self) -> bool:
        """Another line may be begun."""
        return len(self._order) < self._capacity

    def expect(self, line: int) -> None:
        """`line` is begun. Raises Busy when there is no room, Invalid when it was begun already."""
        if not self.has_room:
            raise Busy(f"{self._capacity} lines wait for line {self._order[0]}")
        if line in self._unfinished or line in self._held:
            raise Invalid(f"line {line} is expected already")
        self._order.append(line)
        self._unfinished.add(line)

    def push(self, line: int, payload: T) -> list[tuple[int, T]]:
        """`line` is finished; returns what is now in order. Raises Invalid when it was not expected, or pushed before."""
        if line not in self._unfinished:
            raise Invalid(f"line {line} is not expected")
        self._unfinished.remove(line)
        self._held[line] = payload
        released = []
        while self._order and self._order[0] in self._held:
            first = self._order.popleft()
            released.append((first, self._held.pop(first)))
        return released
