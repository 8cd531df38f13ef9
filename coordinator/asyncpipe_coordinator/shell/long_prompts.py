"""Prompts that take longer to tokenize than steps and heartbeats may wait: a thread does it, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from asyncpipe.actors import ActorRef
from asyncpipe.errors import Busy
from asyncpipe.wire.messages import Accepted, Generate
from asyncpipe_coordinator.text import TextCodec

LONG_TEXT = 4000  # characters: a few milliseconds

Accept = Callable[[Generate, ActorRef, bool], Accepted]
"""Of a request with token ids, its sender, and whether that has cancelled it. Raises AsyncPipeError."""


@dataclass(slots=True, eq=False)
class _Waiting:
    client: ActorRef
    request_id: str
    is_cancelled: bool = False


class LongPrompts:
    def __init__(self, codec: TextCodec, *, max_tokens: int, max_waiting: int, accept: Accept) -> None:
        """`accept` is called on the event loop, between messages."""
        self._codec = codec
        self._max_tokens = max_tokens
        self._max_waiting = max_waiting
        self._accept = accept
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._waiting: list[_Waiting] = []

    @staticmethod
    def is_one(message: Generate) -> bool:
        return message.prompt_token_ids is None and message.prompt is not None and len(message.prompt) > LONG_TEXT

    async def tokenize(self, message: Generate, client: ActorRef) -> Accepted:
        """And accept it then. Raises Busy, and what `accept` and the codec raise."""
        waiting = _Waiting(client, message.request_id)
        self._waiting.append(waiting)
        try:
            if len(self._waiting) > self._max_waiting:
                raise Busy(f"{self._max_waiting} long prompts wait to be tokenized already", retry_after_s=1.0)
            loop, text = asyncio.get_running_loop(), message.prompt or ""
            token_ids = await loop.run_in_executor(self._thread, self._codec.encode, text, self._max_tokens)
            tokenized = msgspec.structs.replace(message, prompt=None, prompt_token_ids=token_ids)
            return self._accept(tokenized, client, waiting.is_cancelled)
        finally:
            self._waiting.remove(waiting)

    def cancel(self, request_id: str, client: ActorRef) -> None:
        """One that waits ends as soon as it is accepted."""
        for waiting in self._waiting:
            if waiting.client == client and waiting.request_id == request_id:
                waiting.is_cancelled = True

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
