"""What has arrived of a request, from which another coordinator can go on."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from asyncpipe.client.inbox import Event
from asyncpipe.wire.messages import Accepted, Generate, Piece, PromptScored
from asyncpipe.wire.seen_scores import SeenScores


@dataclass(slots=True)
class Progress:
    """Of a request for one text."""

    message: Generate
    accepted: Accepted | None = None
    token_ids: list[int] = field(default_factory=list)
    scores: SeenScores = field(default_factory=SeenScores)

    def note(self, event: Accepted | Event) -> Accepted | Event | None:
        """What of `event` is new."""
        match event:
            case Accepted():
                self.accepted = event
                self.scores.begin_again()  # of a coordinator that begins with the prompt
            case Piece():
                self.token_ids.append(event.token_id)
            case PromptScored():
                unseen = self.scores.unseen(event.logprobs)
                return msgspec.structs.replace(event, logprobs=unseen) if unseen else None
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
