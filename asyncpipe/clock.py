"""Time as a parameter: code that needs the time takes a `Clock`, tests hand it one they can move."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds; comparable only within one process."""
        ...


class MonotonicClock:
    def now_s(self) -> float:
        return time.monotonic()
