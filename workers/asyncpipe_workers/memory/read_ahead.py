"""Reading what will be asked for while what was asked for is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from asyncpipe_workers.memory.stored_form import StoredForm

AHEAD_BYTES = 128 << 20  # that are read, or being read, and not taken


class ReadAhead:
    """A thread reads what is expected, in that order; at most `AHEAD_BYTES` wait to be taken, or one tensor that is larger."""

    def __init__(self, read: Callable[[StoredForm], torch.Tensor]) -> None:
        self._read = read
        self._left: deque[StoredForm] = deque()
        self._begun: dict[StoredForm, Future[torch.Tensor]] = {}
        self._begun_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def expect(self, forms: Iterable[StoredForm]) -> None:
        self._left.extend(forms)
        self._begin()

    def take(self, form: StoredForm) -> torch.Tensor | None:
        """What `read` gave for it; None: it was not read ahead, or has been taken. Raises what `read` raised."""
        reading = self._begun.pop(form, None)
        if reading is None:
            return None
        self._begun_bytes -= form.num_bytes
        try:
            return reading.result()
        finally:
            self._begin()

    def close(self) -> None:
        """What is being read is read to its end. May be called again."""
        self._left.clear()
        self._begun.clear()
        self._begun_bytes = 0
        self._thread.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        while self._left and (not self._begun or self._begun_bytes + self._left[0].num_bytes <= AHEAD_BYTES):
            form = self._left.popleft()
            self._begun[form] = self._thread.submit(self._read, form)
            self._begun_bytes += form.num_bytes
