"""A request's tokens as they come, and its result at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from asyncpipe.client.inbox import Event
from asyncpipe.client.results import Choice, Generation, TextPiece
from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import Accepted, Finished, Piece, PromptScored, TokenLogprobs, Usage


@dataclass(slots=True)
class _PartialChoice:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, piece: Piece) -> None:
        self.token_ids.append(piece.token_id)
        self.texts.append(piece.text)
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)


class TextStream:
    """Iterate it once; `result` is there after the last piece. Dropping it, or `aclose()`, cancels the request."""

    def __init__(self, request_id: str, events: AsyncGenerator[Accepted | Event, None], *, num_choices: int = 1) -> None:
        self.request_id = request_id
        self._events = events
        self._prompt_token_ids: tuple[int, ...] = ()
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._choices = [_PartialChoice() for _ in range(num_choices)]

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> TextPiece:
        async for event in self._events:
            match event:
                case Accepted():
                    self._prompt_token_ids = event.prompt_token_ids
                case Piece():
                    self._choices[event.choice].add(event)
                    return TextPiece(event.index, event.token_id, event.text, event.choice, event.logprobs)
                case PromptScored():
                    self._prompt_logprobs += event.logprobs
                case Finished():
                    choice = self._choices[event.choice]
                    choice.texts.append(event.text)
                    choice.finished = event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        await self._events.aclose()

    @property
    def result(self) -> Generation:
        """Everything together. Raises Invalid before the last piece has been read."""
        usages = [choice.finished.usage for choice in self._choices if choice.finished is not None]
        if len(usages) < len(self._choices):
            raise Invalid(f"request {self.request_id} has not finished: read the stream to its end first")
        return Generation(
            request_id=self.request_id,
            prompt_token_ids=self._prompt_token_ids,
            choices=tuple(map(_whole, self._choices)),
            usage=Usage(
                prompt_tokens=usages[0].prompt_tokens,
                completion_tokens=sum(usage.completion_tokens for usage in usages),
                time_to_first_token_s=min(usage.time_to_first_token_s for usage in usages),
                total_s=max(usage.total_s for usage in usages),
            ),
            prompt_logprobs=tuple(self._prompt_logprobs),
        )


def _whole(choice: _PartialChoice) -> Choice:
    assert choice.finished is not None  # noqa: S101 - `result` has looked
    return Choice(tuple(choice.token_ids), "".join(choice.texts), choice.finished.finish_reason, tuple(choice.logprobs))
