"""A request's tokens as they come, and its result at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from asyncpipe.client.inbox import Event
from asyncpipe.client.results import Generation, TextPiece
from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import Accepted, Finished, Piece


class TextStream:
    """Iterate it once; `result` is there after the last piece. Dropping it, or `aclose()`, cancels the request."""

    def __init__(self, request_id: str, events: AsyncGenerator[Accepted | Event, None]) -> None:
        self.request_id = request_id
        self._events = events
        self._prompt_token_ids: tuple[int, ...] = ()
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._finished: Finished | None = None

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> TextPiece:
        async for event in self._events:
            match event:
                case Accepted():
                    self._prompt_token_ids = event.prompt_token_ids
                case Piece():
                    self._token_ids.append(event.token_id)
                    self._texts.append(event.text)
                    return TextPiece(event.index, event.token_id, event.text)
                case Finished():
                    self._texts.append(event.text)
                    self._finished = event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        await self._events.aclose()

    @property
    def result(self) -> Generation:
        """Everything together. Raises Invalid before the last piece has been read."""
        if self._finished is None:
            raise Invalid(f"request {self.request_id} has not finished: read the stream to its end first")
        return Generation(
            request_id=self.request_id,
            prompt_token_ids=self._prompt_token_ids,
            token_ids=tuple(self._token_ids),
            text="".join(self._texts),
            finish_reason=self._finished.finish_reason,
            usage=self._finished.usage,
        )
