"""What has arrived of a request, from which another coordinator can go on."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from asyncpipe.client.inbox import Event
from asyncpipe.wire.messages import Accepted, Generate, Piece, PromptScored


@dataclass(slots=True)
class Progress:
    """Of a request for one text."""

    message: Generate
    accepted: Accepted | None = None
    token_ids: list[int] = field(default_factory=list)
    num_scored: int = 0
    _num_scored_again: int = 0

    def note(self, event: Accepted | Event) -> Accepted | Event | None:
        """What of `event` is new."""
        match event:
            case Accepted():
                self.accepted = event
                self._num_scored_again = 0
            case Piece():
                self.token_ids.append(event.token_id)
            case PromptScored():
                return self._note_scores(event)
        return event

    def rest(self, *, deadline_s: float) -> Generate:
        """The request for what has not arrived: the same tokens follow, for the seed is the same."""
        if self.accepted is None:
            return self.message
        return msgspec.structs.replace(
            self.message,
            prompt=None,
            prompt_token_ids=self.accepted.prompt_token_ids,
            sampling=msgspec.structs.replace(self.message.sampling, seed=self.accepted.seed),
            deadline_s=deadline_s,
            generated_token_ids=tuple(self.token_ids),
        )

    def _note_scores(self, event: PromptScored) -> PromptScored | None:
        """A coordinator that begins again scores the prompt again."""
        known = min(max(self.num_scored - self._num_scored_again, 0), len(event.logprobs))
        self._num_scored_again += len(event.logprobs)
        self.num_scored = max(self.num_scored, self._num_scored_again)
        return msgspec.structs.replace(event, logprobs=event.logprobs[known:]) if known < len(event.logprobs) else None
