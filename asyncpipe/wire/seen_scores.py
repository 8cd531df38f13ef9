"""Which scores of a prompt have arrived, where they may be computed again from the first one."""

from __future__ import annotations

from dataclasses import dataclass

from asyncpipe.wire.sampling import TokenLogprobs


@dataclass(slots=True)
class SeenScores:
    """Counts of prompt tokens: `num_seen` have had a score, `num_again` of them once more since the last beginning."""

    num_seen: int = 0
    num_again: int = 0

    def begin_again(self) -> None:
        self.num_again = 0

    def unseen(self, scores: tuple[TokenLogprobs, ...]) -> tuple[TokenLogprobs, ...]:
        """Those of the next prompt tokens that are new; from now on all of them have been seen."""
        known = min(self.num_seen - self.num_again, len(scores))
        self.num_again += len(scores)
        self.num_seen = max(self.num_seen, self.num_again)
        return scores[known:]
