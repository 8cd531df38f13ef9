"""What a client gets back."""

from __future__ import annotations

from dataclasses import dataclass

from asyncpipe.wire.messages import FinishReason, Usage


@dataclass(frozen=True, slots=True)
class TextPiece:
    """One generated token. `text` is what it adds, possibly "" while a character is incomplete or a stop string may begin."""

    index: int
    token_id: int
    text: str


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished request. `token_ids` are the generated ones, with the end-of-sequence token if there was one."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
