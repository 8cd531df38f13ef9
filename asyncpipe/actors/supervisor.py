"""When a crashed actor is started again, and when it is not."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from asyncpipe.errors import Invalid


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """OTP's rule: at most `max_restarts` within `period_s`; one more crash, and the actor stays down.

    The n-th restart within the period waits `backoff_s * 2**(n - 1)`, at most `max_backoff_s`. With `escalate`, an actor that
    stays down takes its system with it. Source of the rule: Erlang/OTP `supervisor`, restart intensity and period.
    """

    max_restarts: int = 0
    period_s: float = 60.0
    backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    escalate: bool = False

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.period_s <= 0 or self.backoff_s < 0 or self.max_backoff_s < 0:
            raise Invalid(f"{self}: counts and times are not negative, the period is positive")

    @classmethod
    def never(cls) -> RestartPolicy:
        return cls(max_restarts=0)


class RestartCounter:
    """Applies a policy to the crashes of one actor."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._crashes_s: deque[float] = deque()

    def backoff_after_crash_s(self, now_s: float) -> float | None:
        """How long to wait before the restart; None when there is to be none."""
        while self._crashes_s and self._crashes_s[0] <= now_s - self._policy.period_s:
            self._crashes_s.popleft()
        if len(self._crashes_s) >= self._policy.max_restarts:
            return None
        self._crashes_s.append(now_s)
        doubled_s: float = self._policy.backoff_s * 2 ** (len(self._crashes_s) - 1)
        return min(self._policy.max_backoff_s, doubled_s)
