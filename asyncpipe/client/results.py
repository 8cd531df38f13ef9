"""What a client gets back."""

from __future__ import annotations

from dataclasses import dataclass

from asyncpipe.wire.messages import FinishReason, TokenLogprobs, Usage


@dataclass(frozen=True, slots=True)
class TextPiece:
    """One generated token. `text` is what it adds, possibly "" while a character is incomplete or a stop string may begin.

    `choice` counts the choices of a request with `n` > 1; `index` counts the tokens of a choice.
    """

    index: int
    token_id: int
    text: str
    choice: int = 0
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` texts of a request. `token_ids` hold the end-of-sequence token if there was one.

    `logprobs` has an entry a token when they were asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished request. `token_ids`, `text`, `finish_reason` and `logprobs` are those of the first choice.

    `prompt_logprobs`, when asked for, has an entry for each prompt token but the first. `usage` counts all choices.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self.choices[0].logprobs
