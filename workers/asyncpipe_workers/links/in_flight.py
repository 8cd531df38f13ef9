"""The transfers of one end of a link that are under way: bounded, each with a deadline; the failure of one is that of all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from asyncpipe.errors import AsyncPipeError, Busy, Invalid, Timeout
from asyncpipe_workers.links.base import MAX_TAG, TransferStatistics

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Transfer:
    future: asyncio.Future[Any]
    deadline: asyncio.TimerHandle
    num_bytes: int


class InFlight:
    """`on_failure` is called once, when the link has failed and every future has been told."""

    def __init__(self, *, timeout_s: float, max_in_flight: int, on_failure: Callable[[], None]) -> None:
        self.failure: AsyncPipeError | None = None
        self._timeout_s = timeout_s
        self._capacity = max_in_flight
        self._on_failure = on_failure
        self._transfers: dict[int, _Transfer] = {}
        self._high_water_mark = 0
        self._completed = 0
        self._completed_bytes = 0

    def __len__(self) -> int:
        return len(self._transfers)

    def begin(self, tag: int, *, num_bytes: int, late: str) -> asyncio.Future[Any]:
        """The future of a transfer; `late` says what has not happened if its deadline passes.

        Raises what the link failed of, Busy, and Invalid for a tag that is out of range or under way.
        """
        self._check(tag)
        loop = asyncio.get_running_loop()
        transfer = _Transfer(loop.create_future(), loop.call_later(self._timeout_s, self._expire, late), num_bytes)
        self._transfers[tag] = transfer
        self._high_water_mark = max(self._high_water_mark, len(self._transfers))
        return transfer.future

    def finish(self, tag: int, result: object) -> None:
        """It is done; nothing happens if it has failed before."""
        transfer = self._transfers.pop(tag, None)
        if transfer is None:
            return
        transfer.deadline.cancel()
        self._completed += 1
        self._completed_bytes += transfer.num_bytes
        if not transfer.future.done():
            transfer.future.set_result(result)

    def fail(self, error: AsyncPipeError) -> None:
        """The link is dead. The first error is the one that everybody sees."""
        if self.failure is not None:
            return
        self.failure = error
        for transfer in self._transfers.values():
            transfer.deadline.cancel()
            if not transfer.future.done():
                transfer.future.set_exception(error)
        self._transfers.clear()
        self._on_failure()

    def statistics(self) -> TransferStatistics:
        return TransferStatistics(
            in_flight=len(self._transfers),
            high_water_mark=self._high_water_mark,
            capacity=self._capacity,
            completed=self._completed,
            completed_bytes=self._completed_bytes,
        )

    def _check(self, tag: int) -> None:
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        if not 0 <= tag <= MAX_TAG:
            raise Invalid(f"tag {tag} is not between 0 and {MAX_TAG}")
        if tag in self._transfers:
            raise Invalid(f"tag {tag} is under way already")
        if len(self._transfers) >= self._capacity:
            raise Busy(f"{self._capacity} transfers are under way already")

    def _expire(self, late: str) -> None:
        self.fail(Timeout(f"{late} within {self._timeout_s:g} s"))
