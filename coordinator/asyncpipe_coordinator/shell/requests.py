"""The text side of running requests: tokens in, pieces of text out, stop strings noticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncpipe.actors import ActorRef
from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import Failed, Finished, Piece, PromptScored, Sampling
from asyncpipe_coordinator.core.commands import EmitToken
from asyncpipe_coordinator.model_files import ModelInfo
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


def check_prompt(token_ids: tuple[int, ...], model: ModelInfo) -> None:
    """Raises Invalid for a prompt that the model cannot take."""
    if not token_ids:
        raise Invalid("the prompt is empty: give at least one token")
    if len(token_ids) >= model.max_context_len:
        raise Invalid(
            f"the prompt has {len(token_ids)} tokens; the model's context is {model.max_context_len},"
            f" so a prompt may have at most {model.max_context_len - 1}"
        )
    if max(token_ids) >= model.vocab_size:
        raise Invalid(f"token id {max(token_ids)} is outside the model's vocabulary of {model.vocab_size}")
