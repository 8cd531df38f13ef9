"""A bounded mailbox with two lanes: control letters are read first and never wait for data."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncpipe.errors import AsyncPipeError, Busy, Closed, Timeout

if TYPE_CHECKING:
    from asyncpipe.actors.ref import ActorRef

CONTROL_CAPACITY = 4096

Reply = Callable[[Any], None]
"""Answers an ask with a message, or with an exception."""


@dataclass(slots=True)
class Letter:
    """A message on its way to an actor. `taken` is called when the actor takes it: it returns the sender's credit."""

    message: Any
    sender: ActorRef | None = None
    reply: Reply | None = None
    taken: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    depth: int
    control_depth: int
    capacity: int
    high_water_mark: int
    delivered: int
    refused: int
    senders_waiting: int


class Mailbox:
    """Local data letters wait for room; remote ones have waited already, for a credit of their link."""

    def __init__(self, owner: str, capacity: int) -> None:
        self._owner = owner
        self._capacity = capacity
        self._data: deque[Letter] = deque()
        self._control: deque[Letter] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()
        self._closed: AsyncPipeError | None = None
        self._high_water_mark = self._delivered = self._refused = 0

    async def get(self) -> Letter:
        """The next letter, control first. Only the owner's one task reads."""
        while True:
            if self._control:
                return self._take(self._control.popleft())
            if self._data:
                letter = self._take(self._data.popleft())
                self._wake_writer()
                return letter
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    async def put(self, letter: Letter, *, timeout_s: float) -> None:
        """Wait for room, in order of arrival. Raises Timeout, Closed."""
        if self._is_full() or self._writers:
            await self._wait_for_room(timeout_s)
        self._check_open()
        self._append(letter)

    def put_nowait(self, letter: Letter) -> None:
        """Raises Busy when there is no room, Closed."""
        self._check_open()
        if self._is_full():
            self._refused += 1
            raise Busy(f"the mailbox of {self._owner} is full ({self._capacity} messages)")
        self._append(letter)

    def put_credited(self, letter: Letter) -> None:
        """For remote letters, whose number the credits of their link bound. Raises Closed."""
        self._check_open()
        self._append(letter)

    def put_control(self, letter: Letter) -> None:
        """Raises Busy beyond CONTROL_CAPACITY, Closed."""
        self._check_open()
        if len(self._control) >= CONTROL_CAPACITY:
            self._refused += 1
            raise Busy(f"the control lane of {self._owner} is full ({CONTROL_CAPACITY} messages)")
        self._control.append(letter)
        self._wake_reader()

    def close(self, error: AsyncPipeError) -> None:
        """No more letters; askers and waiting writers get `error`, credits go back."""
        self._closed = error
        for letter in (*self._control, *self._data):
            self._take(letter)
            if letter.reply is not None:
                letter.reply(error)
        self._control.clear()
        self._data.clear()
        while self._writers:
            self._wake_writer()

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(
            depth=len(self._data),
            control_depth=len(self._control),
            capacity=self._capacity,
            high_water_mark=self._high_water_mark,
            delivered=self._delivered,
            refused=self._refused,
            senders_waiting=len(self._writers),
        )

    def _is_full(self) -> bool:
        return len(self._data) >= self._capacity

    def _check_open(self) -> None:
        if self._closed is not None:
            raise type(self._closed)(str(self._closed))

    def _append(self, letter: Letter) -> None:
        self._data.append(letter)
        self._high_water_mark = max(self._high_water_mark, len(self._data))
        self._wake_reader()

    def _take(self, letter: Letter) -> Letter:
        self._delivered += 1
        if letter.taken is not None:
            letter.taken()
        return letter

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_writer(self) -> None:
        while self._writers:
            writer = self._writers.popleft()
            if not writer.done():
                writer.set_result(None)
                return

    async def _wait_for_room(self, timeout_s: float) -> None:
        writer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writers.append(writer)
        try:
            async with asyncio.timeout(timeout_s):
                await writer
        except TimeoutError:
            raise Timeout(f"the mailbox of {self._owner} stayed full for {timeout_s:g} s ({self._capacity} messages)") from None
        except asyncio.CancelledError:
            if writer.done() and not writer.cancelled():
                self._wake_writer()  # the room given to us goes to the next
            raise
        finally:
            if writer in self._writers:
                self._writers.remove(writer)


def closed_error(owner: str) -> Closed:
    return Closed(f"actor {owner} has stopped")
