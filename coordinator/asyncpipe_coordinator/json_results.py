"""Results as JSON objects, the same for every command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncpipe.client import Choice
from asyncpipe.wire.messages import TokenLogprobs, Usage


def choice_object(choice: Choice) -> dict[str, Any]:
    """Its "logprobs" are there only when they were asked for."""
    fields = {"token_ids": choice.token_ids, "text": choice.text, "finish_reason": choice.finish_reason.value}
    return fields | {"logprobs": logprobs_objects(choice.logprobs)} if choice.logprobs else fields


def logprobs_objects(logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    return [
        {
            "token_id": token.token_id,
            "logprob": round(token.logprob, 6),
            "rank": token.rank,
            "top": [{"token_id": other.token_id, "logprob": round(other.logprob, 6)} for other in token.top],
        }
        for token in logprobs
    ]


def token_counts(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    """Counts, and seconds since the request arrived."""
    times = {"time_to_first_token_s": round(usage.time_to_first_token_s, 4), "total_s": round(usage.total_s, 4)}
    return token_counts(usage) | times
