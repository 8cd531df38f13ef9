"""Which work of a GPU is known to be done before which, and what becomes of memory that is used without that knowledge.

Streams number their work. A clock says, for each stream, up to which number its work is known to be done; events carry clocks
from one stream to another, and to the host (Lamport 1978; CUDA's own rules: "CUDA C++ Programming Guide", Streams).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Hazard(AssertionError):
    """Something would go wrong on a real GPU, now and then."""


class Clock(dict[int, int]):
    """By stream: the number of its last work that is known to be done."""

    def learn(self, other: Clock) -> None:
        for stream, number in other.items():
            self[stream] = max(number, self.get(stream, 0))

    def knows(self, stream: int, number: int) -> bool:
        return self.get(stream, 0) >= number


class Extent(NamedTuple):
    """Bytes [start, end) of a memory."""

    start: int
    end: int

    def touches(self, other: Extent) -> bool:
        return self.start < other.end and other.start < self.end

    def covers(self, other: Extent) -> bool:
        return self.start <= other.start and other.end <= self.end


class Access(NamedTuple):
    extent: Extent
    stream: int
    number: int
    writes: bool
    what: str


@dataclass(eq=False)
class Memory:
    """What one allocation gave. Its allocator gives it away again, when it is free, to work of the stream `home`, at once."""

    home: int
    on_free: Callable[[Memory], None]
    accesses: list[Access] = field(default_factory=list)
    users: set[int] = field(default_factory=set)  # other streams that the allocator was told of

    def access(self, new: Access, clock: Clock) -> None:
        """Raises Hazard unless `clock`, which the work has waited for, knows all that this must come after."""
        for old in self.accesses:
            conflicts = (old.writes or new.writes) and old.extent.touches(new.extent)
            if conflicts and old.stream != new.stream and not clock.knows(old.stream, old.number):
                raise Hazard(f"{new.what} on stream {new.stream} did not wait for {old.what} on stream {old.stream}")
        self.accesses = [old for old in self.accesses if not _is_outdated(old, new)]
        self.accesses.append(new)

    def __del__(self) -> None:
        self.on_free(self)

    def check_free(self, clock: Clock) -> None:
        """Raises Hazard if another stream may still use it and the allocator does not know."""
        for old in self.accesses:
            if old.stream not in (self.home, *self.users) and not clock.knows(old.stream, old.number):
                raise Hazard(f"memory was freed while {old.what} on stream {old.stream} may use it, without record_stream")


def _is_outdated(old: Access, new: Access) -> bool:
    """Whether who is in order with `new` need not look at `old`."""
    return new.extent.covers(old.extent) and (new.writes or (old.stream == new.stream and not old.writes))
