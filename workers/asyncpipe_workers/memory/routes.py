"""For a batch of a pass: which past tokens go where for attention, and where the new ones' homes are; the same for all layers.

Shapes: N rows (new tokens of continuing sequences), C past tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from asyncpipe.policy import Policy
from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.shares import Counts

COPIED_TOKENS = 256  # so few on the device are copied to the others: one product is quicker than two


class Growth(NamedTuple):
    """A sequence's tokens on each tier before the step at hand, and those that it adds."""

    old: Counts
    added: Counts


class Stretch(NamedTuple):
    """A sequence's past tokens in the workspace, from `start` on: the device's first, then the host's, then the disk's."""

    slot: int
    start: int
    tokens: Counts
    keys_only: bool

    @property
    def end(self) -> int:
        return self.start + sum(self.tokens)


class Group(NamedTuple):
    """Rows [first, last) of the batch, whose past tokens are all in the workspace: `length` each, and room for the new one."""

    first: int
    last: int
    start: int
    length: int


class Homes(NamedTuple):
    """Of new tokens whose home is one tier: rows of the batch, slots, and places in them."""

    rows_N: torch.Tensor
    slots_N: torch.Tensor
    places_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class Route:
    stretches: dict[int, Stretch]  # by slot
    num_tokens: int  # that the workspace holds
    groups: list[Group]
    alone: list[int]  # rows that are in no group
    homes: HomesByTier


class HomesByTier(NamedTuple):
    """Of the rows' new tokens, on each tier; None where there are none."""

    device: Homes | None
    host: Homes | None
    disk: Homes | None


@dataclass(slots=True)
class Router:
    policy: Policy
    growth: Mapping[int, Growth]  # by slot
    _routes: dict[int, Route] = field(default_factory=dict)

    def route(self, layout: StepLayout) -> Route:
        """Made once in a pass."""
        if id(layout) not in self._routes:
            self._routes[id(layout)] = self._make(layout)
        return self._routes[id(layout)]

    def forget(self, layout: StepLayout) -> None:
        """The batch has seen all layers."""
        self._routes.pop(id(layout), None)

    def in_workspace(self, old: Counts, *, whole: bool) -> Counts:
        """Which of a sequence's past tokens are brought to the workspace; the others are attended to where they are. `whole` is
        for chunks of prompts: these attend to one tensor, exactly."""
        in_place = self.policy.cpu_cache_compute and not self.policy.compress_cache and not whole
        device = old.device if self.policy.compress_cache or self._copies(old, whole=whole) else 0
        return Counts(device, 0 if in_place else old.host, old.disk)

    def _copies(self, old: Counts, *, whole: bool) -> bool:
        alone = old.host + old.disk == 0 or (self.policy.cpu_cache_compute and not whole)
        return old.device <= COPIED_TOKENS and not whole and self.policy.attn_sparsity >= 1.0 and not alone

    def _make(self, layout: StepLayout) -> Route:
        stretches: dict[int, Stretch] = {}
        groups: list[Group] = []
        alone: list[int] = []
        start = 0
        sparse = self.policy.attn_sparsity < 1.0
        for index, (slot, _) in enumerate(layout.rows):
            old = self.growth[slot].old
            tokens = self.in_workspace(old, whole=False)
            stretches[slot] = stretch = Stretch(slot, start, tokens, keys_only=sparse)
            start = stretch.end
            if tokens != old or sparse or not any(tokens):
                alone.append(index)
                continue
            last = groups[-1] if groups else None
            length = sum(tokens)
            if last is not None and last.last == index and last.length == length:
                groups[-1] = last._replace(last=index + 1)
            else:
                groups.append(Group(index, index + 1, stretch.start, length))
            start += 1  # for the new token
        for span in layout.spans:
            if span.position:
                slot = span.member.slot
                tokens = self.in_workspace(self.growth[slot].old, whole=True)
                stretches[slot] = Stretch(slot, start, tokens, keys_only=False)
                start = stretches[slot].end
        return Route(stretches, start, groups, alone, self._homes(layout))

    def _homes(self, layout: StepLayout) -> HomesByTier:
        def on(tier: Callable[[Counts], int]) -> Homes | None:
            found = [(index, row.slot) for index, row in enumerate(layout.rows) if tier(self.growth[row.slot].added)]
            if not found:
                return None
            rows, slots = zip(*found, strict=True)
            places = [tier(self.growth[slot].old) for slot in slots]
            return Homes(torch.tensor(rows), torch.tensor(slots), torch.tensor(places))

        return HomesByTier(on(lambda c: c.device), on(lambda c: c.host), on(lambda c: c.disk))
