"""What goes into the next step of a micro-batch: decode tokens, then as much prefill as keeps all steps alike.

The prefill rate follows token throttling as in gLLM (Guo et al. 2025, "gLLM: Global Balanced Pipeline Parallelism System for
Distributed LLM Serving with Token Throttling"): the tokens that wait are spread over the next steps, fewer of them when the
KV memory is nearly full, and decode tokens are spread evenly over the micro-batches. Unlike there, the rate does not fall as
fewer tokens wait: what arrived together is through after those steps, and does not trickle on in ever smaller parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncpipe.wire.messages import MAX_SEQUENCES_PER_STEP, Chunk, Delta, Opened
from asyncpipe_coordinator.core.books import Books
from asyncpipe_coordinator.core.sequences import MicroBatch, Sequence, SequenceState

MIN_PREFILL_TOKENS = 32
KV_RESERVE = 0.05  # prefill slows down to its minimum when so little of the KV memory is free
WATERMARK = 0.01  # free blocks left over by an admission, for the growth of those that run
OLDEST_SHARE = 4  # one in so many prefill tokens is the oldest prompt's, however short the others are


@dataclass(slots=True)
class Composition:
    """A step in the making."""

    parted: list[Sequence] = field(default_factory=list)
    adopted: list[Sequence] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    token_ids: tuple[int, ...] = ()
    padding: int = 0
    num_steps: int = 1

    def delta(self, books: Books) -> Delta:
        left, books.to_forget = tuple(books.to_forget), []
        return Delta(
            left=left,
            parted=tuple(sequence.number for sequence in self.parted),
            adopted=tuple(sequence.number for sequence in self.adopted),
            token_ids=self.token_ids,
            opened=tuple(self.opened),
            chunks=tuple(self.chunks),
            padding=self.padding,
            num_steps=self.num_steps,
        )


def compose(books: Books, micro_batch: MicroBatch, *, most_steps: int, idle_prefill: int) -> Delta:
    """Change `micro_batch` and the books for its next step, and describe the change. Its members rest when this is called.

    There are up to `most_steps` at once, where nobody has begun whom they would hold up; and `idle_prefill` tokens of prompts,
    where nobody decodes.
    """
    step = Composition()
    _part(books, micro_batch, step)
    _adopt(books, micro_batch, step)
    grow(books, micro_batch)
    step.adopted = [sequence for sequence in step.adopted if sequence.state is SequenceState.RUNNING]
    decode(micro_batch, step)
    _admit(books)
    budget = prefill_budget(books, micro_batch, idle_prefill=idle_prefill)
    if not books.is_spare(micro_batch):
        room = _share_of_all(books) - len(micro_batch.members)
        _prefill(books, micro_batch, step, _shares(books.prefilling, budget), room=room)
    elif not micro_batch.members and micro_batch.index == books.num_open:
        _prefill(books, micro_batch, step, _newcomers(books, budget), room=books.limits.max_sequences_per_micro_batch)
    if not (books.prefilling or books.parked or step.chunks):
        _go_on(books, micro_batch, step, most_steps)
    return step.delta(books)


def decode(micro_batch: MicroBatch, step: Composition) -> None:
    """Every member goes on by one token."""
    step.token_ids = tuple(member.last_token for member in micro_batch.members)
    for member in micro_batch.members:
        member.num_computed += 1


def grow(books: Books, micro_batch: MicroBatch) -> None:
    """Blocks for one more token of each member. Where there are none, the least important member gives up its own.

    This cannot go in circles: a sequence that comes back gets blocks for all its tokens and one more, so each return brings at
    least a token; and a sequence alone always fits.
    """
    block_tokens = books.limits.kv_block_tokens
    for member in [member for member in micro_batch.members if (member.length - 1) % block_tokens == 0]:
        while member.state is SequenceState.RUNNING and not books.ledger.reserve(member.number, member.length):
            books.preempt(min(micro_batch.members, key=lambda m: (m.request.priority, -m.arrival)))


def _go_on(books: Books, micro_batch: MicroBatch, step: Composition, most_steps: int) -> None:
    """Further steps of all members, until the first has all its tokens, and as long as there are blocks for everybody."""
    members, ledger = micro_batch.members, books.ledger
    if not members:
        return
    left = [member.most_generated - len(member.generated) for member in members]
    count = min(most_steps, MAX_SEQUENCES_PER_STEP // len(members), *left)
    while count > 1 and len(members) * ledger.blocks_for(count) > ledger.num_free:
        count //= 2
    if count <= 1:
        return
    step.num_steps = count
    for member in members:
        member.num_computed += count - 1
        ledger.reserve(member.number, member.num_computed)


def _part(books: Books, micro_batch: MicroBatch, step: Composition) -> None:
    """Give away whoever is more than this micro-batch's even share."""
    share = 0 if books.is_spare(micro_batch) else -(-books.num_running // books.num_open)
    while len(micro_batch.members) > share:
        sequence = micro_batch.members.pop()
        sequence.move(SequenceState.PARKED)
        books.parked.append(sequence)
        step.parted.append(sequence)


def _adopt(books: Books, micro_batch: MicroBatch, step: Composition) -> None:
    share = 0 if books.is_spare(micro_batch) else -(-books.num_running // books.num_open)
    while books.parked and len(micro_batch.members) < min(share, books.limits.max_sequences_per_micro_batch):
        sequence = books.parked.popleft()
        sequence.move(SequenceState.RUNNING)
        micro_batch.members.append(sequence)
        step.adopted.append(sequence)


def _prefill(
    books: Books, micro_batch: MicroBatch, step: Composition, shares: list[tuple[Sequence, int]], *, room: int
) -> None:
    """`room` is for sequences whose prompt ends with this step."""
    for sequence, count in shares:
        if count == sequence.num_remaining and room <= 0:
            continue  # another micro-batch has room for it
        if not sequence.num_computed:
            step.opened.append(sequence.opened())
        step.chunks.append(Chunk(sequence.number, count))
        sequence.num_computed += count
        if not sequence.num_remaining:
            room -= 1
            start_running(books, micro_batch, sequence)


def start_running(books: Books, micro_batch: MicroBatch, sequence: Sequence) -> None:
    """Its last chunk goes out with this step, which will bring its first token."""
    books.prefilling.remove(sequence)
    sequence.move(SequenceState.RUNNING)
    micro_batch.members.append(sequence)


def _admit(books: Books) -> None:
    """Let waiting sequences begin, in their order, while there are blocks for their tokens and the first new one."""
    limits = books.limits
    watermark = int(WATERMARK * books.ledger.num_blocks) * books.limits.kv_block_tokens
    while (
        books.waiting
        and books.num_admitted < books.num_open * limits.max_sequences_per_micro_batch
        and len(books.prefilling) < limits.max_sequences_per_micro_batch
    ):
        num_tokens = books.waiting.first().length + 1
        if books.num_admitted and books.ledger.num_free < books.ledger.blocks_for(num_tokens + watermark):
            return
        if books.admit(num_tokens=num_tokens) is None:
            return


def prefill_budget(books: Books, micro_batch: MicroBatch, *, idle_prefill: int) -> int:
    """Prompt tokens for one step. When nobody decodes, nobody is held up."""
    most = max(books.limits.max_step_tokens - len(micro_batch.members), 1)
    waiting = books.num_uncomputed
    if not books.num_running:
        books.idle_prefill = max(books.idle_prefill, idle_prefill) if waiting else 0
        return min(books.idle_prefill, most)
    books.idle_prefill = 0
    books.prefill_rate = max(books.prefill_rate, -(-waiting // books.limits.prefill_spread_steps)) if waiting else 0
    free_share = books.ledger.num_free / max(books.ledger.num_blocks, 1)
    headroom = max(free_share - KV_RESERVE, 0.0) / (1.0 - KV_RESERVE)
    rate = min(books.prefill_rate, int(headroom * most))
    return min(max(rate, MIN_PREFILL_TOKENS), most)


def _shares(prefilling: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Who gets how many of `budget` tokens: a part for the oldest, then the shortest first: no short prompt waits long."""
    if not prefilling:
        return []
    oldest = prefilling[0]
    shares = {oldest: min(oldest.num_remaining, -(-budget // OLDEST_SHARE))}
    budget -= shares[oldest]
    for sequence in sorted(prefilling, key=lambda s: s.num_remaining):
        more = min(sequence.num_remaining - shares.get(sequence, 0), budget)
        if more:
            shares[sequence] = shares.get(sequence, 0) + more
            budget -= more
    return list(shares.items())


def _newcomers(books: Books, budget: int) -> list[tuple[Sequence, int]]:
    """Whole prompts for the spare micro-batch, short ones first: those that would wait behind a long one's chunks."""
    if not any(sequence.num_computed for sequence in books.prefilling):
        return []
    whole = []
    for sequence in sorted(books.prefilling, key=lambda s: s.num_remaining):
        if not sequence.num_computed and sequence.num_remaining <= budget:
            whole.append((sequence, sequence.num_remaining))
            budget -= sequence.num_remaining
    return whole


def _share_of_all(books: Books) -> int:
    """Members that a micro-batch has when everyone who is here or waits is spread evenly."""
    everyone = books.num_admitted + len(books.waiting)
    return min(-(-everyone // books.num_open), books.limits.max_sequences_per_micro_batch)
