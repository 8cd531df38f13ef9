"""The sequences of a stage and the micro-batches they are in, and from a step's delta to its layout."""

from __future__ import annotations

import torch

from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import Delta, Opened
from asyncpipe_workers.indices import indices
from asyncpipe_workers.layout import Member, Row, Span, StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.sampling import Sampler


class StageSequences:
    """All sequences of a stage; `micro_batches` in the order that the coordinator knows."""

    def __init__(self, cache: KVCache, *, device: torch.device, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.cache = cache
        self._device = device
        self._eos_token_ids = eos_token_ids
        self._members: dict[int, Member] = {}
        self._micro_batches: dict[int, list[Member]] = {}

    def members(self, micro_batch: int) -> list[int]:
        """Numbers of its sequences."""
        return [member.number for member in self._micro_batches.get(micro_batch, ())]

    def apply(self, micro_batch: int, delta: Delta) -> StepLayout:
        """Change who is where, and lay out the step. Raises Invalid for a delta that does not fit."""
        members = self._micro_batches.setdefault(micro_batch, [])
        for number in delta.left:
            self._forget(number)
        for number in delta.parted:
            members.remove(self._known(number, among=members))
        for number in delta.adopted:
            members.append(self._known(number))
        if len(delta.token_ids) != len(members):
            raise Invalid(f"{len(delta.token_ids)} tokens for the {len(members)} sequences of the micro-batch")
        for opened in delta.opened:
            self._open(opened)
        rows = [self._next_row(member, token_id) for member, token_id in zip(members, delta.token_ids, strict=True)]
        spans = self._spans(delta, first_row=len(rows))
        complete = [span for span in spans if span.member.length == span.member.sampler.num_tokens]
        sampled_rows = [*range(len(rows)), *(span.end - 1 for span in complete)]
        members += [span.member for span in complete]
        return self._layout(delta, rows, spans, sampled=list(members), sampled_rows=sampled_rows)

    def forget_all(self) -> None:
        """As if nobody had ever been here."""
        for number in list(self._members):
            self._forget(number)
        self._micro_batches.clear()

    def _open(self, opened: Opened) -> None:
        if not opened.token_ids or opened.sequence in self._members:
            raise Invalid(f"sequence {opened.sequence} cannot begin: it has no tokens, or is here already")
        sampler = Sampler(opened.sampling, opened.token_ids, num_prompt=opened.num_prompt, eos_token_ids=self._eos_token_ids)
        self._members[opened.sequence] = Member(opened.sequence, self.cache.open(), sampler)

    def _forget(self, number: int) -> None:
        member = self._members.pop(number, None)
        if member is None:
            raise Invalid(f"sequence {number} leaves, but is not here")
        for members in self._micro_batches.values():
            if member in members:
                members.remove(member)
        self.cache.close(member.slot)

    def _known(self, number: int, among: list[Member] | None = None) -> Member:
        member = self._members.get(number)
        if member is None or (among is not None and member not in among):
            raise Invalid(f"sequence {number} is not here")
        return member

    def _next_row(self, member: Member, token_id: int) -> Row:
        member.sampler.push(token_id)
        member.length += 1
        self.cache.reserve(member.slot, member.length)
        return Row(member.slot, member.length)

    def _spans(self, delta: Delta, *, first_row: int) -> list[Span]:
        spans, row = [], first_row
        for chunk in delta.chunks:
            member = self._known(chunk.sequence)
            if member.length + chunk.count > member.sampler.num_tokens:
                raise Invalid(f"sequence {chunk.sequence} has no {chunk.count} more tokens")
            spans.append(Span(member, row, row + chunk.count, member.length))
            row += chunk.count
            member.length += chunk.count
            self.cache.reserve(member.slot, member.length)
        return spans

    def _layout(
        self, delta: Delta, rows: list[Row], spans: list[Span], *, sampled: list[Member], sampled_rows: list[int]
    ) -> StepLayout:
        token_ids, positions = list(delta.token_ids), [row.length - 1 for row in rows]
        prompt_lens = [member.sampler.num_prompt for member in sampled[: len(rows)]]
        for span in spans:
            end = span.position + span.end - span.start
            positions += range(span.position, end)
            token_ids += span.member.sampler.token_ids[span.position : end]
            prompt_lens += [span.member.sampler.num_prompt] * (end - span.position)
        return StepLayout(
            token_ids=token_ids + [0] * delta.padding,
            positions_T=indices(positions + [0] * delta.padding, self._device),
            rows=rows,
            spans=spans,
            padding=delta.padding,
            sampled=sampled,
            sampled_rows=indices(sampled_rows, self._device),
            prompt_lens=prompt_lens + [0] * delta.padding,
        )
