"""What a stage has computed, on its way to one neighbour."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from asyncpipe.actors import ActorRef
from asyncpipe.errors import AsyncPipeError, Broken, Busy
from asyncpipe.wire.messages import Step, Tokens
from asyncpipe_workers.recorder import StageRecorder

SEND_TIMEOUT_S = 60.0
MAX_WAITING = 1024  # there are never more than micro-batches


class Outgoing(NamedTuple):
    """What becomes of `step`, not to be sent before `due_ns` of the monotonic clock."""

    step: Step
    message: Step | Tokens
    due_ns: int = 0


class Sender:
    """To the neighbour that `target` is, in order: at once what can leave at once, the rest as there are credits and as its
    time comes. `on_unreachable` hears of what could not be sent.
    """

    def __init__(self, name: str, *, recorder: StageRecorder, on_unreachable: Callable[[AsyncPipeError], None]) -> None:
        self.target: ActorRef | None = None
        self._name = name
        self._recorder = recorder
        self._on_unreachable = on_unreachable
        self._epoch: int | None = None
        self._waiting: asyncio.Queue[Outgoing] = asyncio.Queue(MAX_WAITING)
        self._is_sending = False

    def begin(self, epoch: int | None) -> None:
        """What has not left is of no use to anybody; None: nor is what comes."""
        self._epoch = epoch
        while not self._waiting.empty():
            self._waiting.get_nowait()

    def send(self, outgoing: Outgoing) -> None:
        start_ns = time.monotonic_ns()
        if self._waiting.empty() and not self._is_sending and outgoing.due_ns <= start_ns:
            try:
                self._reached().tell_nowait(outgoing.message)
            except Busy:
                pass
            except AsyncPipeError as error:
                self._on_unreachable(error)
                return
            else:
                self._recorder.sent(outgoing.step, start_ns=start_ns, end_ns=time.monotonic_ns())
                return
        self._waiting.put_nowait(outgoing)

    async def send_waiting(self) -> None:
        """Until it is cancelled."""
        while True:
            self._is_sending = False
            outgoing = await self._waiting.get()
            self._is_sending = True
            if (early_ns := outgoing.due_ns - time.monotonic_ns()) > 0:
                await asyncio.sleep(early_ns / 1e9)
            if outgoing.step.epoch != self._epoch:
                continue
            start_ns = time.monotonic_ns()
            try:
                await self._reached().tell(outgoing.message, timeout=SEND_TIMEOUT_S)
            except AsyncPipeError as error:
                if outgoing.step.epoch == self._epoch:
                    self._on_unreachable(error)
            self._recorder.sent(outgoing.step, start_ns=start_ns, end_ns=time.monotonic_ns())

    def _reached(self) -> ActorRef:
        if self.target is None:
            raise Broken(f"{self._name} is lost")
        return self.target
