"""The emulated machine: its cards, their streams, what the host knows, and copies that are under way.

Work is done when it is launched, but for copies between a card and page-locked memory: they come as late as they may.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.emulated_cuda.order import Access, Clock, Extent, Hazard, Memory

GARBAGE = 0xA5


@dataclass(eq=False)
class Stream:
    """`work` counts what was launched on it; `clock` is what the next work comes after."""

    device: torch.device
    number: int
    work: int = 0
    clock: Clock = field(default_factory=Clock)


@dataclass(eq=False)
class Copy:
    """One that is under way: `finish` moves the bytes."""

    memory: Memory
    extent: Extent
    stream: int
    number: int
    finish: Callable[[], None]


class Threads(threading.local):
    """What each thread has chosen."""

    def __init__(self) -> None:
        self.card = 0
        self.streams: dict[int, Stream] = {}
        self.capture: Any = None


class Machine:
    def __init__(self, *, num_cards: int, card_bytes: int) -> None:
        self.num_cards = num_cards
        self.card_bytes = card_bytes
        self.lock = threading.RLock()
        self.thread = Threads()
        self.host = Clock()
        self.waits: list[str] = []  # of the host: for what
        self.hazards: list[Hazard] = []
        self.contexts: set[int] = set()  # cards that this process keeps hundreds of megabytes on
        self._streams: dict[int, Stream] = {}
        self._copies: list[Copy] = []
        self._pinned: dict[int, torch.Tensor] = {}  # by address; it stays, so that addresses are not used again
        self._defaults = [self.new_stream(torch.device("cuda", index)) for index in range(num_cards)]

    # --- cards and streams ---

    def device(self, which: Any) -> torch.device:
        if which is None:
            return torch.device("cuda", self.thread.card)
        device = torch.device("cuda", which) if isinstance(which, int) else torch.device(which)
        index = self.thread.card if device.index is None else device.index
        if device.type != "cuda" or index >= self.num_cards:
            raise RuntimeError(f"invalid device ordinal: {which}")
        return torch.device("cuda", index)

    def new_stream(self, device: torch.device) -> Stream:
        with self.lock:
            stream = Stream(device, len(self._streams) + 1)
            self._streams[stream.number] = stream
            return stream

    def stream(self, device: torch.device) -> Stream:
        """The calling thread's current one."""
        return self.thread.streams.get(device.index, self._defaults[device.index])

    def clock_of(self, card: int) -> Clock:
        """All its work."""
        clock = Clock()
        for stream in self._streams.values():
            if stream.device.index == card:
                clock.learn(stream.clock)
        return clock

    # --- work ---

    def launch(self, stream: Stream) -> int:
        """The number of new work on the stream."""
        self.contexts.add(stream.device.index)
        stream.work += 1
        stream.clock.learn(self.host)
        stream.clock[stream.number] = stream.work
        return stream.work

    def access(self, memory: Memory, extent: Extent, stream: Stream, *, writes: bool, what: str) -> None:
        """Of the stream's last work."""
        self._finish(lambda copy: copy.memory is memory and copy.extent.touches(extent))
        try:
            memory.access(Access(extent, stream.number, stream.work, writes, what), stream.clock)
        except Hazard as hazard:
            self.hazards.append(hazard)
            raise

    def free(self, memory: Memory) -> None:
        with self.lock:
            try:
                memory.check_free(self._home_clock(memory))
            except Hazard as hazard:
                self.hazards.append(hazard)

    def _home_clock(self, memory: Memory) -> Clock:
        """What work that takes the memory over will have waited for, at the least."""
        clock = Clock(self.host)
        clock.learn(self._streams[memory.home].clock)
        return clock

    def fail(self, what: str) -> None:
        self.hazards.append(Hazard(what))
        raise self.hazards[-1]

    # --- the host ---

    def wait(self, clock: Clock, what: str) -> None:
        """The calling thread sleeps until all of that is done."""
        self.waits.append(what)
        self.learn(clock)

    def learn(self, clock: Clock) -> None:
        """The host has seen it. What one thread knows all do: how they tell each other is not emulated."""
        self.host.learn(clock)
        self._finish(lambda copy: self.host.knows(copy.stream, copy.number))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.contexts:
            self.contexts.add(self.thread.card)
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def copy_later(self, copy: Copy) -> None:
        self._copies.append(copy)

    def _finish(self, is_due: Callable[[Copy], bool]) -> None:
        due = [copy for copy in self._copies if is_due(copy)]
        self._copies = [copy for copy in self._copies if copy not in due]
        for copy in due:
            copy.finish()
