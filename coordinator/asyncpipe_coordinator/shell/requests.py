"""The text side of running requests: tokens in, pieces of text out, stop strings noticed."""

from __future__ import annotations

from dataclasses import dataclass

from asyncpipe.actors import ActorRef
from asyncpipe.wire.messages import Piece, Sampling
from asyncpipe_coordinator.text import IncrementalDetokenizer, StopStrings, TextCodec


@dataclass(slots=True)
class OpenRequest:
    """A request that some client waits for."""

    request_id: str
    client: ActorRef
    detokenizer: IncrementalDetokenizer
    stops: StopStrings
    stopped: bool = False  # a stop string was seen; what comes after it is not shown

    @classmethod
    def create(cls, request_id: str, *, client: ActorRef, codec: TextCodec, sampling: Sampling) -> OpenRequest:
        return cls(request_id, client, codec.detokenizer(), StopStrings(sampling.stop))

    def piece(self, *, index: int, token_id: int, is_last: bool) -> Piece:
        """The message for one token; the last one carries all text that was held back."""
        text = self.stops.push(self.detokenizer.push(token_id))
        if is_last and not self.stops.found:
            text += self.rest()
        return Piece(request_id=self.request_id, index=index, token_id=token_id, text=text)

    def rest(self) -> str:
        """Text held back so far: an incomplete character, or what might have begun a stop string."""
        return self.stops.push(self.detokenizer.flush()) + self.stops.flush()
