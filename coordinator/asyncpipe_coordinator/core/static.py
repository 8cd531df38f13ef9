"""Static batching, the baseline: fill a batch, pad it to its longest prompt, run it until its last sequence has ended.

Padding and ended sequences are computed as rows that belong to nobody, as padded systems compute them.
"""

from __future__ import annotations

from asyncpipe.wire.messages import Chunk, Delta
from asyncpipe_coordinator.core.books import Books
from asyncpipe_coordinator.core.continuous import Composition, decode, grow, start_running
from asyncpipe_coordinator.core.sequences import MicroBatch, Sequence


def compose(books: Books, micro_batch: MicroBatch, *, most_steps: int, idle_prefill: int) -> Delta:
    """Like `continuous.compose`, one step at a time, and whole prompts."""
    step = Composition()
    grow(books, micro_batch)
    if micro_batch.members:
        decode(micro_batch, step)
        step.padding = micro_batch.num_started - len(micro_batch.members)
    else:
        _start_batch(books, micro_batch, step)
    return step.delta(books)


def _start_batch(books: Books, micro_batch: MicroBatch, step: Composition) -> None:
    batch: list[Sequence] = []
    while books.waiting and len(batch) < books.limits.max_sequences_per_micro_batch:
        sequence = books.admit(num_tokens=_longest(books, books.waiting.first()))
        if sequence is None:
            break
        batch.append(sequence)
    longest = max((sequence.length for sequence in batch), default=0)
    step.padding = sum(longest - sequence.length for sequence in batch)
    micro_batch.num_started = len(batch)
    for sequence in batch:
        step.opened.append(sequence.opened())
        step.chunks.append(Chunk(sequence.number, sequence.length))
        sequence.num_computed = sequence.length
        start_running(books, micro_batch, sequence)


def _longest(books: Books, sequence: Sequence) -> int:
    """Blocks for all that it may generate, so that a batch once started runs to its end."""
    limit = min(books.limits.max_context_len, books.ledger.max_tokens)
    most = sequence.request.sampling.max_new_tokens
    return limit if most is None else min(len(sequence.request.prompt_token_ids) + most, limit)
