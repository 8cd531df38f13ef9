"""A micro-batch as a stage sees it: its sequences in order, their slots, and the layout of one step.

A step is ragged: first one new token of each sequence that goes on (B of them), then the whole prompts of those that join,
end to end. Nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import Delta, Joined
from asyncpipe_workers.memory.kv import KVCache


@dataclass(slots=True)
class Member:
    """One sequence. `length` counts the tokens in the cache."""

    number: int
    slot: int
    length: int
    sampling: Joined
    num_sampled: int = 0


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Rows [start, end) of the step are the prompt of the sequence in `slot`."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class StepLayout:
    """What the layers need to know. T rows in total, the first B of which continue a sequence each."""

    token_ids: tuple[int, ...]  # T; only the first stage looks at them
    positions_T: torch.Tensor
    num_continuing: int  # B
    slots_B: torch.Tensor
    lengths_B: torch.Tensor  # before this step, in micro-batch order
    row_of_slot: torch.Tensor | None  # None: row i has slot i
    mask_B11C: torch.Tensor | None  # in slot order, True where there is a token; None: all of the same length
    longest: int  # tokens of the longest continuing sequence, the new one included
    prompts: tuple[PromptSpan, ...]
    last_rows: torch.Tensor  # one row a sequence, in micro-batch order


class MicroBatch:
    """The sequences of one micro-batch and their cache."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.members: list[Member] = []

    def apply(self, delta: Delta) -> StepLayout:
        """Let sequences leave and join, and lay out the step. Raises Invalid for a delta that does not fit."""
        for number in delta.left:
            self._leave(number)
        continuing = list(self.members)
        if len(delta.token_ids) != len(continuing):
            raise Invalid(f"{len(delta.token_ids)} tokens for the {len(continuing)} sequences of the micro-batch")
        for joined in delta.joined:
            self._join(joined)
        longest_prompt = max((len(joined.token_ids) for joined in delta.joined), default=0)
        longest = max((member.length + 1 for member in continuing), default=0)
        self.cache.reserve(len(self.members), max(longest, longest_prompt))
        layout = self._layout(delta, continuing, longest)
        for member in continuing:
            member.length += 1
        for member, joined in zip(self.members[len(continuing) :], delta.joined, strict=True):
            member.length = len(joined.token_ids)
        return layout

    def _leave(self, number: int) -> None:
        """The last slot moves into the place that becomes free, so that the slots in use stay without a gap."""
        leaver = next((member for member in self.members if member.number == number), None)
        if leaver is None:
            raise Invalid(f"sequence {number} leaves a micro-batch that it is not in")
        self.members.remove(leaver)
        last_slot = len(self.members)
        if leaver.slot != last_slot:
            moved = next(member for member in self.members if member.slot == last_slot)
            self.cache.move(last_slot, leaver.slot, moved.length)
            moved.slot = leaver.slot

    def _join(self, joined: Joined) -> None:
        if not joined.token_ids or any(member.number == joined.sequence for member in self.members):
            raise Invalid(f"sequence {joined.sequence} cannot join: it has no prompt, or is here already")
        self.members.append(Member(joined.sequence, slot=len(self.members), length=0, sampling=joined))

    def _layout(self, delta: Delta, continuing: list[Member], longest: int) -> StepLayout:
        prompts, positions, token_ids = [], [member.length for member in continuing], list(delta.token_ids)
        for member, joined in zip(self.members[len(continuing) :], delta.joined, strict=True):
            start = len(positions)
            positions += range(len(joined.token_ids))
            token_ids += joined.token_ids
            prompts.append(PromptSpan(member.slot, start, len(positions)))
        rows = [*range(len(continuing)), *(span.end - 1 for span in prompts)]
        slots = [member.slot for member in continuing]
        lengths = [member.length for member in continuing]
        return StepLayout(
            token_ids=tuple(token_ids),
            positions_T=self._indices(positions),
            num_continuing=len(continuing),
            slots_B=self._indices(slots),
            lengths_B=self._indices(lengths),
            row_of_slot=None if slots == sorted(slots) else self._indices(slots).argsort(),
            mask_B11C=self._mask(slots, lengths, longest),
            longest=longest,
            prompts=tuple(prompts),
            last_rows=self._indices(rows),
        )

    def _mask(self, slots: list[int], lengths: list[int], longest: int) -> torch.Tensor | None:
        """Which cached tokens each slot has, (B, 1, 1, C), once this step's token is written behind them."""
        if len(set(lengths)) <= 1:
            return None
        by_slot_B1 = self._indices([length for _, length in sorted(zip(slots, lengths, strict=True))])[:, None]
        columns_C = torch.arange(longest, device=self.cache.device)
        return (columns_C <= by_slot_B1)[:, None, None, :]

    def _indices(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.cache.device)
