"""The text side of running requests: tokens in, pieces of text out, stop strings noticed."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncpipe.actors import ActorRef
from asyncpipe.wire.messages import Failed, Finished, Piece, PromptScored, Sampling
from asyncpipe_coordinator.core.commands import EmitToken
from asyncpipe_coordinator.shell.outbox import Outbox
from asyncpipe_coordinator.text import Detokenizer, StopStrings, TextCodec

Update = Piece | PromptScored | Finished | Failed


@dataclass(slots=True, eq=False)
class Recipient:
    """A client: where its updates go, and those that wait for the end of the message at hand."""

    ref: ActorRef
    outbox: Outbox
    outbox_ref: ActorRef
    updates: list[Update] = field(default_factory=list)


@dataclass(slots=True)
class OpenChoice:
    """One of the texts of a request that some client waits for."""

    request_id: str
    choice: int
    client: Recipient
    detokenizer: Detokenizer
    stops: StopStrings
    min_tokens: int
    stopped: bool = False  # a stop string was seen; what comes after it is not shown

    @classmethod
    def create(cls, request_id: str, choice: int, *, client: Recipient, codec: TextCodec, sampling: Sampling) -> OpenChoice:
        stops = StopStrings(sampling.stop)
        return cls(request_id, choice, client, codec.detokenizer(), stops, sampling.min_tokens)

    def piece(self, token: EmitToken, *, is_last: bool) -> Piece:
        """The message for one token; the last one carries all text that was held back."""
        text = self.detokenizer.push(token.token_id)
        if self.stops.is_active and token.index >= self.min_tokens:
            text = self.stops.push(text)
        if is_last and not self.stops.found:
            text += self.rest()
        return Piece(
            request_id=self.request_id,
            index=token.index,
            token_id=token.token_id,
            text=text,
            choice=self.choice,
            logprobs=token.logprobs,
        )

    def rest(self) -> str:
        """Text held back so far: an incomplete character, or what might have begun a stop string."""
        return self.stops.push(self.detokenizer.flush()) + self.stops.flush()
