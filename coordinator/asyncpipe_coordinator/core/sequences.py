"""One request on its way through the pipeline, and the micro-batch it travels in."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import msgspec

from asyncpipe.wire.messages import Opened, Sampling, Step
from asyncpipe.wire.seen_scores import SeenScores
from asyncpipe_coordinator.core.events import Submitted


class SequenceState(enum.Enum):
    WAITING = "waiting"  # for room
    PREFILLING = "prefilling"  # it owns blocks; chunks of its tokens travel in steps of any micro-batch
    RUNNING = "running"  # a member of a micro-batch, one token a step
    PARKED = "parked"  # between two micro-batches, with its KV
    DONE = "done"


_LEGAL_MOVES = {
    SequenceState.WAITING: {SequenceState.PREFILLING, SequenceState.DONE},
    SequenceState.PREFILLING: {SequenceState.RUNNING, SequenceState.WAITING, SequenceState.DONE},
    SequenceState.RUNNING: {SequenceState.PARKED, SequenceState.WAITING, SequenceState.DONE},
    SequenceState.PARKED: {SequenceState.RUNNING, SequenceState.WAITING, SequenceState.DONE},
    SequenceState.DONE: set[SequenceState](),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """`number` names it towards the stages; a sequence that lost its KV comes back under a new one."""

    arrival: int
    number: int
    request: Submitted
    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0  # tokens whose keys and values the stages hold once everything in flight is done
    generated: list[int] = field(default_factory=list)
    first_token_at_s: float | None = None
    scores: SeenScores = field(default_factory=SeenScores)  # by the client; they begin again when the KV is lost
    may_end_with: frozenset[int] = frozenset()  # tokens that end it, unless it is too short yet
    most_generated: int = 0  # so many, and it is at its end

    def move(self, to: SequenceState) -> None:
        """Raises RuntimeError with the story for a move that cannot be."""
        if to not in _LEGAL_MOVES[self.state]:
            raise RuntimeError(
                f"sequence {self.number} of request {self.request.request_id} cannot go from {self.state.value} to"
                f" {to.value} ({len(self.generated)} tokens generated)"
            )
        self.state = to

    @property
    def length(self) -> int:
        """Prompt and generated tokens."""
        return len(self.request.prompt_token_ids) + len(self.generated)

    def most_within(self, max_context_len: int) -> int:
        """Tokens that may be generated in all."""
        room, wanted = max_context_len - len(self.request.prompt_token_ids), self.request.sampling.max_new_tokens
        return room if wanted is None else min(wanted, room)

    @property
    def num_remaining(self) -> int:
        """Tokens to be computed before the next one can be sampled."""
        return self.length - self.num_computed

    @property
    def last_token(self) -> int:
        return self.generated[-1]

    def opened(self) -> Opened:
        request = self.request
        return Opened(
            sequence=self.number,
            token_ids=(*request.prompt_token_ids, *self.generated),
            num_prompt=len(request.prompt_token_ids),
            sampling=_for_stages(request.sampling, seed=request.seed, was_scored=self._was_scored),
        )

    @property
    def _was_scored(self) -> bool:
        """Each prompt token but the first has a score."""
        return self.scores.num_seen >= len(self.request.prompt_token_ids) - 1

    def lose_cache(self, new_number: int) -> None:
        """Back to waiting: everything has to be computed again."""
        self.move(SequenceState.WAITING)
        self.number = new_number
        self.num_computed = 0
        self.scores.begin_again()


def _for_stages(sampling: Sampling, *, seed: int, was_scored: bool) -> Sampling:
    """What the last stage needs to choose tokens; the end of a text is the coordinator's business."""
    return msgspec.structs.replace(
        sampling,
        max_new_tokens=None,
        n=1,
        stop=(),
        ignore_eos=False,
        seed=seed if sampling.temperature > 0 else None,
        stop_token_ids=sampling.stop_token_ids if sampling.min_tokens else (),
        prompt_logprobs=None if was_scored else sampling.prompt_logprobs,
    )


@dataclass(slots=True)
class InFlight:
    """A step in the pipeline, or several at once, of which some may be back."""

    step: Step
    sampled: tuple[Sequence, ...]  # for each token that a step brings: whose it is
    since_s: float  # when it was issued, or the last tokens came
    num_back: int = 0

    @property
    def num_awaited(self) -> int:
        return self.step.delta.num_steps - self.num_back

    @property
    def next_number(self) -> int:
        """Of the step whose tokens come next."""
        return self.step.step + self.num_back


@dataclass(slots=True)
class MicroBatch:
    """Sequences in the order in which every stage keeps them. At most one step of it is in the pipeline at a time."""

    index: int
    members: list[Sequence] = field(default_factory=list)
    in_flight: InFlight | None = None
    ended: list[Sequence] = field(default_factory=list)  # members whom the steps in flight go on computing
    next_step: int = 0
    num_started: int = 0  # static batching: how many sequences the batch began with

    @property
    def goes_on(self) -> bool:
        """Whether the steps that are in flight follow each other by themselves, and others may come between them."""
        return self.in_flight is not None and self.in_flight.step.delta.num_steps > 1
