"""Where every sequence is: the state that the composers of steps work on."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from asyncpipe_coordinator.core.blocks import BlockLedger
from asyncpipe_coordinator.core.limits import Limits
from asyncpipe_coordinator.core.sequences import MicroBatch, Sequence, SequenceState
from asyncpipe_coordinator.core.waiting import WaitingQueue


@dataclass(slots=True)
class Books:
    """`ledger` is of the running pipeline; without one it has no blocks, so that nothing is admitted."""

    limits: Limits
    ledger: BlockLedger
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    prefilling: list[Sequence] = field(default_factory=list)  # in order of admission
    parked: deque[Sequence] = field(default_factory=deque)
    to_forget: list[int] = field(default_factory=list)  # numbers that the stages hear of with the next step of any micro-batch
    micro_batches: list[MicroBatch] = field(default_factory=list)
    num_open: int = 1  # micro-batches beyond these take nobody and give away whom they have
    prefill_rate: int = 0  # prompt tokens a step while others decode, for as long as some wait
    idle_prefill: int = 0  # and while nobody does
    num_preemptions: int = 0
    next_number: int = 0

    def without_pipeline(self) -> Books:
        """Of the same sequences, all of them waiting, in their order; numbers go on, so that no stage sees one twice."""
        ledger = BlockLedger(num_blocks=0, block_tokens=self.limits.kv_block_tokens)
        books = Books(self.limits, ledger, num_preemptions=self.num_preemptions, next_number=self.next_number)
        for sequence in self.waiting:
            books.waiting.push(sequence)
        members = [member for micro_batch in self.micro_batches for member in micro_batch.members]
        for sequence in [*self.prefilling, *self.parked, *members]:
            sequence.lose_cache(books.number())
            books.waiting.push(sequence)
        return books

    def number(self) -> int:
        """A fresh one."""
        self.next_number += 1
        return self.next_number - 1

    def open_micro_batches(self, count: int, *, with_spare: bool) -> None:
        """`with_spare` makes one more, for newcomers that would have to wait for a long prompt's steps."""
        self.num_open = count
        while len(self.micro_batches) < count + with_spare:
            self.micro_batches.append(MicroBatch(len(self.micro_batches)))

    def is_spare(self, micro_batch: MicroBatch) -> bool:
        return micro_batch.index >= self.num_open

    @property
    def num_running(self) -> int:
        return sum(len(micro_batch.members) for micro_batch in self.micro_batches) + len(self.parked)

    @property
    def num_admitted(self) -> int:
        """Sequences that own blocks."""
        num_ended = sum(len(micro_batch.ended) for micro_batch in self.micro_batches)
        return self.num_running + len(self.prefilling) + num_ended

    @property
    def num_uncomputed(self) -> int:
        """Tokens of those that wait, or have begun and do not decode yet."""
        return self.waiting.num_tokens + sum(sequence.num_remaining for sequence in self.prefilling)

    def admit(self, *, num_tokens: int) -> Sequence | None:
        """The first waiting sequence, now prefilling, if there are blocks for `num_tokens` of it."""
        sequence = self.waiting.first()
        if not self.ledger.reserve(sequence.number, num_tokens):
            return None
        self.waiting.pop()
        sequence.most_generated = sequence.most_within(self.max_context_len)
        sequence.move(SequenceState.PREFILLING)
        self.prefilling.append(sequence)
        return sequence

    @property
    def max_context_len(self) -> int:
        """Of the model, or what fits into the KV memory when that is less."""
        return min(self.limits.max_context_len, self.ledger.max_tokens)

    def forget(self, sequence: Sequence) -> None:
        """It ends: out of wherever it is. Its blocks are free at once, for the stages hear of it before any later step; but
        where steps follow each other by themselves, after the last of them."""
        match sequence.state:
            case SequenceState.WAITING:
                self.waiting.remove(sequence)
            case SequenceState.PREFILLING:
                self.prefilling.remove(sequence)
                self._release(sequence)
            case SequenceState.PARKED:
                self.parked.remove(sequence)
                self._release(sequence)
            case SequenceState.RUNNING:
                home = self.home_of(sequence)
                home.members.remove(sequence)
                if home.goes_on:
                    home.ended.append(sequence)
                else:
                    self._release(sequence)
        sequence.move(SequenceState.DONE)

    def come_back(self, micro_batch: MicroBatch) -> None:
        """It rests: nobody computes those any more who have ended meanwhile."""
        micro_batch.in_flight = None
        for sequence in micro_batch.ended:
            self._release(sequence)
        micro_batch.ended.clear()

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits to be computed again, in its old place in the queue."""
        self.home_of(sequence).members.remove(sequence)
        self._release(sequence)
        sequence.lose_cache(self.number())
        self.waiting.push(sequence)
        self.num_preemptions += 1

    def home_of(self, sequence: Sequence) -> MicroBatch:
        return next(micro_batch for micro_batch in self.micro_batches if sequence in micro_batch.members)

    def _release(self, sequence: Sequence) -> None:
        self.ledger.free(sequence.number)
        if sequence.num_computed:
            self.to_forget.append(sequence.number)

    def check(self) -> None:
        """Raises AssertionError when the books do not agree."""
        self.ledger.check()
        members = [member for micro_batch in self.micro_batches for member in micro_batch.members]
        places = {
            SequenceState.WAITING: list(self.waiting),
            SequenceState.PREFILLING: self.prefilling,
            SequenceState.PARKED: list(self.parked),
            SequenceState.RUNNING: members,
        }
        everyone = [sequence for place in places.values() for sequence in place]
        _assert(len(set(map(id, everyone))) == len(everyone), "a sequence is in two places")
        for state, place in places.items():
            _assert(all(sequence.state is state for sequence in place), f"a sequence among the {state.value} is not")
        owners = {
            sequence.number for state, place in places.items() if state is not SequenceState.WAITING for sequence in place
        }
        owners |= {sequence.number for micro_batch in self.micro_batches for sequence in micro_batch.ended}
        _assert(owners == self.ledger.owners(), "blocks are owned by somebody who is not there")
        _assert(not owners & set(self.to_forget), "a sequence is to be forgotten and is not")
        _assert(self.waiting.num_tokens == sum(s.length for s in self.waiting), "the queue's tokens do not add up")
        for micro_batch in self.micro_batches:
            num_members = len(micro_batch.members) + len(micro_batch.ended)
            _assert(num_members <= self.limits.max_sequences_per_micro_batch, "a micro-batch is over its bound")
            _assert(micro_batch.goes_on or not micro_batch.ended, "an ended sequence keeps its blocks")


def _assert(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
