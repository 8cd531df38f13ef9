"""The stages as the scheduling core sees them: deltas applied to the letter, blocks counted, tokens given."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncpipe.wire.messages import Opened, StageTiming, Step, Tokens


@dataclass(slots=True)
class FakeSequence:
    opened: Opened
    length: int = 0  # tokens computed
    tokens: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.length == len(self.tokens)


class FakeStages:
    """`take` each step in the order of issue; it raises AssertionError for a delta that a stage could not apply."""

    def __init__(self, *, num_stages: int, num_blocks: int, block_tokens: int, max_members: int) -> None:
        self._num_stages = num_stages
        self._num_blocks = num_blocks
        self._block_tokens = block_tokens
        self._max_members = max_members
        self.sequences: dict[int, FakeSequence] = {}
        self.micro_batches: dict[int, list[int]] = {}
        self.in_flight: dict[int, tuple[Step, list[int]]] = {}  # by micro-batch, with the sequences that are sampled

    @property
    def num_blocks_used(self) -> int:
        return sum(-(-sequence.length // self._block_tokens) for sequence in self.sequences.values())

    def take(self, step: Step) -> None:
        assert step.micro_batch not in self.in_flight, "a micro-batch is in two places"
        delta, members = step.delta, self.micro_batches.setdefault(step.micro_batch, [])
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
        assert len(delta.token_ids) == len(members), "a token for each member"
        for number, token_id in zip(members, delta.token_ids, strict=True):
            self.sequences[number].tokens.append(token_id)
            self.sequences[number].length += 1
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
        self.in_flight[step.micro_batch] = (step, list(members))

    def answer(self, micro_batch: int, token_ids: list[int] | None = None, *, compute_us: int = 1000) -> Tokens:
        """The tokens of the step in flight; without `token_ids` each sequence's next token tells it from all others."""
        step, sampled = self.in_flight.pop(micro_batch)
        if token_ids is None:
            token_ids = [self.next_token(number) for number in sampled]
        return Tokens(
            epoch=step.epoch,
            micro_batch=micro_batch,
            step=step.step,
            token_ids=tuple(token_ids),
            timings=(StageTiming(0, compute_us),) * self._num_stages,
        )

    def next_token(self, number: int) -> int:
        """Known to the core's client too: from the tokens before it alone."""
        sequence = self.sequences.get(number)
        return next_token(sequence.tokens) if sequence is not None else 0


def next_token(tokens: list[int]) -> int:
    return 10 + (sum(tokens) * 31 + len(tokens)) % 1000
