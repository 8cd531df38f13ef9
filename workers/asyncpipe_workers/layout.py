"""The layout of one step: which of its rows are whose.

A step is ragged: one new token of each of B continuing sequences, then chunks of prompts, end to end. Nothing is padded, unless
the coordinator asks for rows of padding to show what they cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from asyncpipe_workers.sampling import Sampler

SCRATCH_TOKENS = 256  # of which kernels' scratch has room for a multiple


@dataclass(slots=True)
class Member:
    """One sequence. `length` counts its tokens in the cache; `sampler` knows all its tokens."""

    number: int
    slot: int
    sampler: Sampler
    length: int = 0


class Row(NamedTuple):
    """A sequence that goes on by one token: `length` with it."""

    slot: int
    length: int


class RowGroup(NamedTuple):
    """Rows of a step whose sequences are in `num` neighbouring slots, from `first_slot` on, and that see `places` of them."""

    rows: slice | torch.Tensor
    first_slot: int
    num: int
    places: slice
    newest: tuple[int, ...]  # of each: where its new token goes
    mask_N11C: torch.Tensor | None  # to be added to scores: -inf for what a row does not see; None: each sees all


class Seen(NamedTuple):
    """What each of the rows sees: the same in every layer of one window."""

    sequences_B3: torch.Tensor  # int64: slot, first token, length
    longest: int  # tokens that one may see, so that the same scratch does for many steps

    @classmethod
    def of(cls, rows: Sequence[Row], window: int | None) -> Seen:
        firsts = [0 if window is None else max(row.length - window, 0) for row in rows]
        sequences = [(row.slot, first, row.length) for row, first in zip(rows, firsts, strict=True)]
        longest = max(length - first for _, first, length in sequences)
        return cls(torch.tensor(sequences), -(-longest // SCRATCH_TOKENS) * SCRATCH_TOKENS)


class Rotation(NamedTuple):
    """Of each row of a step: the cosine for both halves of a head, the sine for one."""

    cos_T1K: torch.Tensor
    sin_T1F: torch.Tensor


class Frequencies(Protocol):
    """By which positions become rotations: see `models.rope`."""

    def rotation(self, layout: StepLayout, dtype: torch.dtype) -> Rotation: ...


class FixedRows(NamedTuple):
    """B sequences that go on by a token each, in tensors whose contents change from step to step, and whose shapes do not."""

    positions_B: torch.Tensor  # of the new tokens
    tables_BN: torch.Tensor  # the blocks that each one's tokens are in
    masks: dict[int | None, torch.Tensor]  # by window, (B, 1, 1, C), once they have been computed


class Span(NamedTuple):
    """Rows [start, end) of the step are tokens of `member`, from position `position` on."""

    member: Member
    start: int
    end: int
    position: int


@dataclass(frozen=True, slots=True)
class StepLayout:
    """What the layers need to know. T rows in total, the first B of which continue a sequence each."""

    token_ids: list[int]  # T; only the first stage looks at them
    positions_T: torch.Tensor
    rows: list[Row]  # B
    spans: list[Span]
    padding: int
    sampled: list[Member] = field(default_factory=list)  # whose next token this step gives, in micro-batch order
    sampled_rows: torch.Tensor | None = None  # of each
    groups: dict[int | None, list[RowGroup]] = field(default_factory=dict)  # by window, once they have been found
    seen: dict[int | None, Seen] = field(default_factory=dict)  # by window; the same where rows need no groups
    prompt_lens: list[int] = field(default_factory=list)  # T; of each row's sequence
    rotations: dict[Frequencies, Rotation] = field(default_factory=dict)  # once they have been computed
    fixed: FixedRows | None = None  # of all rows, in place of `rows`, when they are on the device

    def __len__(self) -> int:
        return len(self.token_ids)

    def batches(self, num_sequences: int, num_rows: int) -> Iterator[Batch]:
        """Parts of at most `num_sequences` sequences, and of `num_rows` rows where one sequence has not more, one after the
        other."""
        if len(self.rows) + len(self.spans) <= num_sequences and len(self) <= num_rows:
            yield Batch(self, slice(0, len(self)))
            return
        for first in range(0, len(self.rows), num_sequences):
            yield self._batch(slice(first, min(first + num_sequences, len(self.rows))), [])
        for spans in _together(self.spans, num_sequences, num_rows):
            yield self._batch(slice(spans[0].start, spans[-1].end), spans)
        if self.padding:
            yield self._batch(slice(len(self) - self.padding, len(self)), [], padding=self.padding)

    def _batch(self, rows: slice, spans: list[Span], *, padding: int = 0) -> Batch:
        """`rows` all continue a sequence each, or are those of `spans`, or padding."""
        continuing = slice(0, 0) if spans or padding else rows
        layout = StepLayout(
            token_ids=self.token_ids[rows],
            positions_T=self.positions_T[rows],
            rows=self.rows[continuing],
            spans=[span._replace(start=span.start - rows.start, end=span.end - rows.start) for span in spans],
            padding=padding,
            prompt_lens=self.prompt_lens[rows],
        )
        return Batch(layout, rows)


def _together(spans: Sequence[Span], num_sequences: int, num_rows: int) -> Iterator[list[Span]]:
    batch: list[Span] = []
    for span in spans:
        if batch and (len(batch) == num_sequences or span.end - batch[0].start > num_rows):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


class Batch(NamedTuple):
    """Part of a step: its own layout, and which rows of the step it is."""

    layout: StepLayout
    rows: slice
