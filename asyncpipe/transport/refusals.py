"""Refusals in the log: each is said once, for a hostile peer can repeat itself a thousand times a second."""

from __future__ import annotations

import logging
import time

FORGET_AFTER_S = 600.0
MAX_REFUSALS = 32  # different ones within FORGET_AFTER_S; a peer may make a new key for each attempt

log = logging.getLogger(__name__)


class RefusalLog:
    """Of one listener."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._said: set[str] = set()
        self._since_s = time.monotonic()

    def refused(self, reason: str) -> None:
        """Log `reason`, unless it was logged within the last ten minutes, or many others were."""
        now_s = time.monotonic()
        if now_s - self._since_s > FORGET_AFTER_S:
            self._said.clear()
            self._since_s = now_s
        if reason in self._said or len(self._said) >= MAX_REFUSALS:
            return
        self._said.add(reason)
        is_last = len(self._said) == MAX_REFUSALS
        log.warning(
            "refused a peer at %s: %s%s", self._address, reason, " (more are not logged for a while)" if is_last else ""
        )
