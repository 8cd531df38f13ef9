"""One request on its way through the pipeline, and the micro-batch it travels in."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from asyncpipe.wire.messages import Delta, Joined, Step
from asyncpipe_coordinator.core.events import Submitted


class SequenceState(enum.Enum):
    WAITING = "waiting"  # for a place in a micro-batch
    RUNNING = "running"
    LEAVING = "leaving"  # the client has its end; the stages have not heard yet
    DONE = "done"


_LEGAL_MOVES = {
    SequenceState.WAITING: {SequenceState.RUNNING, SequenceState.DONE},
    SequenceState.RUNNING: {SequenceState.LEAVING, SequenceState.DONE},
    SequenceState.LEAVING: {SequenceState.DONE},
    SequenceState.DONE: set[SequenceState](),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """`number` names it towards the stages."""

    number: int
    request: Submitted
    state: SequenceState = SequenceState.WAITING
    num_generated: int = 0
    last_token: int = -1
    first_token_at_s: float | None = None

    def move(self, to: SequenceState) -> None:
        """Raises RuntimeError with the story for a move that cannot be."""
        if to not in _LEGAL_MOVES[self.state]:
            raise RuntimeError(
                f"sequence {self.number} of request {self.request.request_id} cannot go from {self.state.value} to"
                f" {to.value} ({self.num_generated} tokens generated)"
            )
        self.state = to

    @property
    def length(self) -> int:
        """Prompt and generated tokens."""
        return len(self.request.prompt_token_ids) + self.num_generated

    def joined(self) -> Joined:
        sampling = self.request.sampling
        return Joined(
            sequence=self.number,
            token_ids=self.request.prompt_token_ids,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=self.request.seed,
        )


@dataclass(slots=True)
class MicroBatch:
    """Sequences in the order in which every stage keeps them. At most one step of it is in the pipeline at a time."""

    index: int
    members: list[Sequence] = field(default_factory=list)
    in_flight: Step | None = None
    next_step: int = 0

    def num_staying(self) -> int:
        return sum(member.state is SequenceState.RUNNING for member in self.members)

    def make_step(self, epoch: int, joining: list[Sequence]) -> tuple[Step, list[Sequence]]:
        """The next step, and who has left with it. Changes the membership as `Delta` says the stages will."""
        left = [member for member in self.members if member.state is SequenceState.LEAVING]
        staying = [member for member in self.members if member.state is SequenceState.RUNNING]
        delta = Delta(
            left=tuple(member.number for member in left),
            token_ids=tuple(member.last_token for member in staying),
            joined=tuple(member.joined() for member in joining),
        )
        self.members = staying + joining
        self.in_flight = Step(epoch=epoch, micro_batch=self.index, step=self.next_step, delta=delta)
        self.next_step += 1
        return self.in_flight, left
