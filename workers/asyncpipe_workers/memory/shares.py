"""Rows that come one after the other, shared out over the tiers so that each tier has its share of all that there are. Pure."""

from __future__ import annotations

from typing import NamedTuple

from asyncpipe.policy import Shares


class Counts(NamedTuple):
    """Rows on each tier."""

    device: int = 0
    host: int = 0
    disk: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self, other, strict=True)))


class Apportionment:
    """Of many sequences of rows: each tier has its share of all rows, and of each sequence's own, to a row or two."""

    def __init__(self, shares: Shares) -> None:
        self._shares = tuple(share / 100 for share in shares)
        self.total = Counts()

    def most(self, length: int) -> Counts:
        """That a sequence of `length` rows may have on each tier."""
        return Counts(*(min(length, int(share * length) + 1) if share else 0 for share in self._shares))

    def extend(self, old: Counts, more: int) -> Counts:
        """Where the next `more` rows go of a sequence that has `old`: how many of them on each tier."""
        added = self._whole(old, more)
        for _ in range(more - sum(added)):
            added = added.plus(self._next(old.plus(added), self.total.plus(added)))
        self.total = self.total.plus(added)
        return added

    def remove(self, counts: Counts) -> None:
        """A sequence ends."""
        self.total = self.total.minus(counts)

    def _whole(self, old: Counts, more: int) -> Counts:
        """What each tier is due for certain, the fractions left open; never more than `more` in total."""
        length, left, due = sum(old) + more, more, []
        for share, count in zip(self._shares, old, strict=True):
            due.append(min(max(int(share * length) - count, 0), left))
            left -= due[-1]
        return Counts(*due)

    def _next(self, sequence: Counts, everyone: Counts) -> Counts:
        """One row: to the tier that all sequences together owe most, among those that this one does not favour already."""
        length, all_rows = sum(sequence) + 1, sum(everyone) + 1
        own = [share * length - count for share, count in zip(self._shares, sequence, strict=True)]
        owed = [share * all_rows - count for share, count in zip(self._shares, everyone, strict=True)]
        fair = [tier for tier in range(3) if own[tier] > 0] or [max(range(3), key=lambda tier: own[tier])]
        chosen = max(fair, key=lambda tier: owed[tier])
        return Counts(*(int(tier == chosen) for tier in range(3)))
