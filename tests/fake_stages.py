"""The stages as the scheduling core sees them: deltas applied to the letter, blocks counted, tokens given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncpipe.wire.messages import Opened, StageTiming, Step, Tokens


@dataclass(slots=True)
class FakeSequence:
    opened: Opened
    length: int = 0  # tokens computed
    tokens: list[int] = field(default_factory=list)
    chosen: int | None = None  # the next one, once everything before it is computed

    @property
    def is_complete(self) -> bool:
        return self.length == len(self.tokens)


def next_token(tokens: list[int]) -> int:
    """Tells a sequence from all others, and is known to the core's client too: from the tokens before it alone."""
    return 10 + (sum(tokens) * 31 + len(tokens)) % 1000


@dataclass(frozen=True, slots=True)
class Answer:
    """To one step, or one stage's to several at once."""

    epoch: int
    step: int
    token_ids: tuple[int, ...]
    num_rows: int  # that are computed for it


class FakeStages:
    """`take` each step in the order of issue; it raises AssertionError for a delta that a stage could not apply.

    Of several steps at once all are computed when they are taken, as early as real stages might. They are answered one by one,
    or together if one stage computes them, or they are gathered.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        num_blocks: int,
        block_tokens: int,
        max_members: int,
        choose: Callable[[list[int]], int] = next_token,
    ) -> None:
        self._num_stages = num_stages
        self._num_blocks = num_blocks
        self._block_tokens = block_tokens
        self._max_members = max_members
        self._choose = choose
        self.sequences: dict[int, FakeSequence] = {}
        self.micro_batches: dict[int, list[int]] = {}
        self.in_flight: dict[int, deque[Answer]] = {}  # by micro-batch: what it brings, step by step
        self._going_on: set[int] = set()  # micro-batches of which several steps are in flight, or were
        self.num_at_once = 0  # times that several steps came at once

    @property
    def num_blocks_used(self) -> int:
        return sum(-(-sequence.length // self._block_tokens) for sequence in self.sequences.values())

    def take(self, step: Step) -> None:
        assert step.micro_batch not in self.in_flight, "a micro-batch is in two places"
        delta, members = step.delta, self.micro_batches.setdefault(step.micro_batch, [])
        going_on = {number for index in self._going_on for number in self.micro_batches[index]}
        assert not going_on & {*delta.left, *delta.parted, *delta.adopted}, "a member of steps that follow each other is moved"
        for number in delta.left:
            del self.sequences[number]
            for others in self.micro_batches.values():
                if number in others:
                    others.remove(number)
        for number in delta.parted:
            members.remove(number)
        for number in delta.adopted:
            assert all(number not in others for others in self.micro_batches.values())
            assert self.sequences[number].is_complete
            members.append(number)
        self._continue([self.sequences[number] for number in members], delta.token_ids)
        for opened in delta.opened:
            assert opened.sequence not in self.sequences
            self.sequences[opened.sequence] = FakeSequence(opened, tokens=list(opened.token_ids))
        for chunk in delta.chunks:
            sequence = self.sequences[chunk.sequence]
            sequence.length += chunk.count
            assert sequence.length <= len(sequence.tokens)
            if sequence.is_complete:
                members.append(chunk.sequence)
        assert len(members) <= self._max_members
        assert self.num_blocks_used <= self._num_blocks, "out of KV memory"
        self.num_at_once += delta.num_steps > 1
        sampled = self._sampled([self.sequences[number] for number in members], delta.num_steps)
        if self._num_stages == 1 or step.is_gathered:
            sampled = [tuple(token_id for tokens in sampled for token_id in tokens)]
        answers = (Answer(step.epoch, step.step + number, tokens, delta.num_rows) for number, tokens in enumerate(sampled))
        self.in_flight[step.micro_batch] = deque(answers)
        if delta.num_steps > 1:
            self._going_on.add(step.micro_batch)

    def _continue(self, members: list[FakeSequence], token_ids: tuple[int, ...]) -> None:
        chosen = tuple(sequence.chosen for sequence in members)
        assert token_ids == chosen, "a token for each member, and the one that was chosen"
        for sequence, token_id in zip(members, token_ids, strict=True):
            sequence.tokens.append(token_id)
            sequence.length += 1
        assert self.num_blocks_used <= self._num_blocks, "out of KV memory"

    def _sampled(self, members: list[FakeSequence], num_steps: int) -> list[tuple[int, ...]]:
        """Of each step."""
        sampled: list[tuple[int, ...]] = []
        for _ in range(num_steps):
            if sampled:
                self._continue(members, sampled[-1])
            for sequence in members:
                sequence.chosen = self._choose(sequence.tokens)
            sampled.append(tuple(sequence.chosen for sequence in members if sequence.chosen is not None))
        return sampled

    def answer(self, micro_batch: int, *, compute_us: int = 1000) -> Tokens:
        """The tokens of the micro-batch's next step in flight."""
        answers = self.in_flight[micro_batch]
        answer = answers.popleft()
        if not answers:
            del self.in_flight[micro_batch]
            self._going_on.discard(micro_batch)
        return Tokens(
            epoch=answer.epoch,
            micro_batch=micro_batch,
            step=answer.step,
            token_ids=answer.token_ids,
            timings=(StageTiming(0, compute_us),) * self._num_stages,
        )
