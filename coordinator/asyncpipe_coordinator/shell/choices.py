"""The text side of a running request: tokens in, pieces of text out, stop strings noticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncpipe.wire.messages import Piece, Sampling
from asyncpipe_coordinator.core.commands import EmitToken
from asyncpipe_coordinator.shell.clients import Recipient
from asyncpipe_coordinator.text import Detokenizer, StopStrings, TextCodec


@dataclass(slots=True)
class OpenChoice:
    """One of the texts of a request that some client waits for."""

    request_id: str
    choice: int
    client: Recipient
    detokenizer: Detokenizer
    stops: StopStrings
    min_tokens: int
    num_to_stop: int | None = None  # tokens with which a stop string was complete: what comes after them is not shown

    @classmethod
    def create(
        cls,
        request_id: str,
        choice: int,
        *,
        client: Recipient,
        codec: TextCodec,
        sampling: Sampling,
        generated_token_ids: Sequence[int] = (),
    ) -> OpenChoice:
        """What goes on after `generated_token_ids` holds back what they had held back."""
        stops = StopStrings(sampling.stop)
        created = cls(request_id, choice, client, codec.detokenizer(), stops, sampling.min_tokens)
        for index, token_id in enumerate(generated_token_ids):
            created._text(index, token_id)
        return created

    def piece(self, token: EmitToken, *, is_last: bool) -> Piece:
        """The message for one token; the last one carries all text that was held back."""
        text = self._text(token.index, token.token_id)
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

    def _text(self, index: int, token_id: int) -> str:
        text = self.detokenizer.push(token_id)
        return self.stops.push(text) if self.stops.is_active and index >= self.min_tokens else text

    def rest(self) -> str:
        """Text held back so far: an incomplete character, or what might have begun a stop string."""
        return self.stops.push(self.detokenizer.flush()) + self.stops.flush()
