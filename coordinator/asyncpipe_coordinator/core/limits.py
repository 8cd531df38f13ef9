"""What the scheduling core is told at its start, and by the stages when they are up."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Schedule(enum.StrEnum):
    CONTINUOUS = "continuous"  # requests join and leave between steps; each micro-batch is issued again as it returns
    BARRIER = "barrier"  # the same, but no micro-batch is issued before all have returned: to measure what barriers cost
    STATIC = "static"  # a padded batch is filled, and run to its end: the baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    num_stages: int
    num_micro_batches: int | None  # None: chosen from what is measured
    max_sequences_per_micro_batch: int
    max_waiting: int
    max_context_len: int
    max_step_tokens: int  # prompt tokens and sequences of one step together
    kv_block_tokens: int
    eos_token_ids: frozenset[int]
    prefill_spread_steps: int = 8  # over which prompt tokens that wait are spread while others decode
    schedule: Schedule = Schedule.CONTINUOUS

    @property
    def most_micro_batches(self) -> int:
        """So many are ever open; one more may be spare."""
        return self.num_micro_batches or 4 * self.num_stages + 4

    @property
    def max_sequences(self) -> int:
        """That stages ever hold at once."""
        return (self.most_micro_batches + 1) * self.max_sequences_per_micro_batch
