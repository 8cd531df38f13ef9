"""What the pipeline achieved beside what the same stage times allow.

The ideal is a flow shop: every step passes the stages in order, a stage takes one step at a time, nothing else takes time, and
the next step is always ready. No schedule of these steps can be shorter. Only time in which there was work counts: a period
begins with the first step of an empty pipeline and ends when all its steps are back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class EfficiencyMeter:
    num_stages: int
    num_steps: int = 0
    busy_s: list[float] = field(default_factory=list)  # by stage, over all periods
    _past_ideal_s: float = 0.0
    _past_measured_s: float = 0.0
    _began_at_s: float | None = None
    _last_at_s: float = 0.0
    _free_at_s: list[float] = field(default_factory=list)  # of each ideal stage, since the period began

    def issued(self, at_s: float) -> None:
        if self._began_at_s is None:
            self._began_at_s = self._last_at_s = at_s
            self._free_at_s = [0.0] * self.num_stages
            self.busy_s = self.busy_s or [0.0] * self.num_stages

    def returned(self, stage_s: Sequence[float], at_s: float, *, num_steps: int = 1) -> None:
        """A step came back, or several at once, after `stage_s` of computing in each stage."""
        if self._began_at_s is None:
            return
        self.num_steps += num_steps
        ready_s = 0.0
        for _ in range(num_steps):
            for stage, seconds in enumerate(stage_s):
                ready_s = self._free_at_s[stage] = max(ready_s, self._free_at_s[stage]) + seconds / num_steps
        for stage, seconds in enumerate(stage_s):
            self.busy_s[stage] += seconds
        self._last_at_s = at_s

    def emptied(self) -> None:
        """Nothing is in flight any more: there is no work, or the pipeline is gone."""
        if self._began_at_s is not None:
            self._past_ideal_s, self._past_measured_s = self.ideal_s, self.measured_s
            self._began_at_s = None

    @property
    def ideal_s(self) -> float:
        return self._past_ideal_s + (max(self._free_at_s, default=0.0) if self._began_at_s is not None else 0.0)

    @property
    def measured_s(self) -> float:
        return self._past_measured_s + (self._last_at_s - self._began_at_s if self._began_at_s is not None else 0.0)

    @property
    def efficiency(self) -> float:
        """0..1; 0 before any step has come back."""
        return min(self.ideal_s / self.measured_s, 1.0) if self.measured_s > 0 else 0.0

    @property
    def bubble(self) -> float:
        """The share of all stages' time, while there was work, in which they did not compute."""
        if self.measured_s <= 0:
            return 0.0
        return max(0.0, 1.0 - sum(self.busy_s) / (self.num_stages * self.measured_s))
