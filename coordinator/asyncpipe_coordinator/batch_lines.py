"""One line of a batch file: parsed into a request, answered with an object. The files themselves are in `batch_files`.

A line is a JSON object in one of two formats:

    {"prompt": "Once upon", "max_new_tokens": 16, "custom_id": "a"}                         plain
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": …}}   OpenAI's batch format

A field that is null counts as left out. Sources: OpenAI API reference, "Batch" and "Completions"; vLLM's extra parameters.
"""

from __future__ import annotations

import difflib
import enum
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from asyncpipe.client import Choice, Generation
from asyncpipe.client.sampling import SamplingOptions, make_sampling
from asyncpipe.errors import Invalid
from asyncpipe.wire.fields import MAX_PROMPT_CHARS, TokenIds
from asyncpipe.wire.sampling import Sampling, TokenLogprobs
from asyncpipe_coordinator.json_results import choice_object, logprobs_objects, token_counts, usage_object

COMPLETIONS_URL = "/v1/completions"
MAX_PRIORITY = 1000  # and the least is -1000
OPENAI_DEFAULTS: Mapping[str, Any] = {"max_tokens": 16, "temperature": 1.0}

_BYTE_ORDER_MARK = "\ufeff".encode()
_SAMPLING_NAMES = Sampling.__struct_fields__
_PLAIN_NAMES = ("prompt", "prompt_token_ids", "custom_id", "priority", "max_tokens", *_SAMPLING_NAMES)
_OPENAI_NAMES = ("custom_id", "method", "url", "body")
_BODY_NAMES = (
    *("model", "user", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "logprobs"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),  # vLLM's
)
_NO_EFFECT: Mapping[str, object] = {"stream": False, "echo": False}  # what clients write although it is the default


class LineFormat(enum.StrEnum):
    PLAIN = "plain"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a line asks for. `options` are keyword arguments of `Client.generate`, only those that the line sets."""

    line: int  # from 1
    custom_id: str | None
    prompt: str | tuple[int, ...]
    options: dict[str, Any]
    priority: int
    format: LineFormat


# --- parsing ----------------------------------------------------------------------------------------------------------


def parse_line(data: bytes | str, line: int) -> BatchRequest:
    """The request in `data`, which is line number `line` (from 1). Raises Invalid, whose message does not repeat the number."""
    fields = _decode(data)
    if fields.keys() & {"method", "url", "body"}:
        return _parse_openai(fields, line)
    return _parse_plain(fields, line)


def find_custom_id(data: bytes | str) -> str | None:
    """The custom_id of a line that `parse_line` refuses, for its error record; None when it has none that can be read."""
    try:
        return _custom_id(_decode(data))
    except Invalid:
        return None


def _decode(data: bytes | str) -> dict[str, Any]:
    try:
        encoded = data.encode() if isinstance(data, str) else data
        fields = msgspec.json.decode(encoded.removeprefix(_BYTE_ORDER_MARK).decode())  # Python says which byte is wrong
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Invalid('not a JSON object; write one like {"prompt": "Once upon a time"}')
    return fields


def _parse_plain(fields: dict[str, Any], line: int) -> BatchRequest:
    _check_names(fields, _PLAIN_NAMES)
    fields = _without_nulls(fields)
    return BatchRequest(
        line=line,
        custom_id=_custom_id(fields),
        prompt=_plain_prompt(fields),
        options=_options(fields),
        priority=_priority(fields),
        format=LineFormat.PLAIN,
    )


def _parse_openai(fields: dict[str, Any], line: int) -> BatchRequest:
    _check_names(fields, _OPENAI_NAMES)
    fields = _without_nulls(fields)
    if (url := fields.get("url", "none")) != COMPLETIONS_URL:
        raise Invalid(f"only {COMPLETIONS_URL} is supported in batch files; this line asks for {url}")
    if (method := fields.get("method", "POST")) != "POST":
        raise Invalid(f'"method" must be "POST"; this line has {method!r}')
    if not isinstance(body := fields.get("body"), dict):
        raise Invalid('"body" must be an object like {"prompt": "Once upon a time"}')
    body = {name: value for name, value in _without_nulls(body).items() if _NO_EFFECT.get(name) != value}
    _check_names(body, _BODY_NAMES)
    if body.get("top_k") == -1:  # vLLM's word for off
        body["top_k"] = 0
    return BatchRequest(
        line=line,
        custom_id=_custom_id(fields),
        prompt=_completion_prompt(body.get("prompt")),
        options=_options({**OPENAI_DEFAULTS, **body}),
        priority=0,
        format=LineFormat.OPENAI,
    )


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_names(names: Collection[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            suggestion = f'; did you mean "{close[0]}"?' if close else ";"
            raise Invalid(f'"{name[:100]}" is not supported{suggestion} known: {", ".join(known)}')


def _plain_prompt(fields: Mapping[str, Any]) -> str | tuple[int, ...]:
    if ("prompt" in fields) == ("prompt_token_ids" in fields):
        raise Invalid('give either "prompt" (a text) or "prompt_token_ids" (a list of numbers)')
    if "prompt_token_ids" in fields:
        return _token_ids(fields["prompt_token_ids"], name="prompt_token_ids")
    if isinstance(fields["prompt"], str):
        return _text(fields["prompt"])
    raise Invalid('"prompt" must be a text; token ids go into "prompt_token_ids"')


def _completion_prompt(prompt: Any) -> str | tuple[int, ...]:
    """OpenAI's prompt is a text, or token ids, or a list of such; here the list has one entry."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise Invalid(f"one prompt a line: this line has {len(prompt)}; write a line for each")
        prompt = prompt[0]
    return _text(prompt) if isinstance(prompt, str) else _token_ids(prompt, name="prompt")


def _text(prompt: str) -> str:
    if not prompt:
        raise Invalid("an empty prompt: give at least one character")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise Invalid(f"the prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARS} are possible")
    return prompt


def _token_ids(prompt: Any, *, name: str) -> tuple[int, ...]:
    try:
        token_ids = msgspec.convert(prompt, TokenIds)
    except msgspec.ValidationError as error:
        what = "a text or a list of token ids" if name == "prompt" else "a list of token ids"
        raise Invalid(f'"{name}" must be {what}: {str(error).replace("`", "")}') from None
    if not token_ids:
        raise Invalid(f'"{name}" is empty: give at least one token')
    return token_ids


def _custom_id(fields: Mapping[str, Any]) -> str | None:
    custom_id = fields.get("custom_id")
    if isinstance(custom_id, bool) or not isinstance(custom_id, str | int | None):
        raise Invalid('"custom_id" must be a text or a whole number')
    return None if custom_id is None else str(custom_id)


def _priority(fields: Mapping[str, Any]) -> int:
    priority = fields.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise Invalid(f'"priority" must be a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}')
    return priority


def _options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters among `fields`, checked."""
    options = {name: value for name, value in fields.items() if name in _SAMPLING_NAMES}
    if "max_tokens" in fields:
        if "max_new_tokens" in options:
            raise Invalid('give either "max_new_tokens" or "max_tokens": they mean the same')
        options["max_new_tokens"] = fields["max_tokens"]
    if "logit_bias" in options:
        options["logit_bias"] = _logit_bias(options["logit_bias"])
    make_sampling(cast(SamplingOptions, options))
    return options


def _logit_bias(bias: Any) -> dict[int, float]:
    """JSON's keys are texts; token ids are numbers."""
    try:
        return msgspec.convert(bias, dict[int, float], str_keys=True)
    except msgspec.ValidationError:
        raise Invalid('"logit_bias" must be token ids with numbers, like {"50256": -100}') from None


# --- results ----------------------------------------------------------------------------------------------------------


def plain_result(request: BatchRequest, outcome: Generation) -> dict[str, Any]:
    """The output object of a plain line: the first choice's fields, and all "choices" when there are several."""
    result: dict[str, Any] = {"line": request.line}
    if request.custom_id is not None:
        result["custom_id"] = request.custom_id
    result["prompt" if isinstance(request.prompt, str) else "prompt_token_ids"] = request.prompt
    result |= choice_object(outcome.choices[0])
    if len(outcome.choices) > 1:
        result["choices"] = [{"index": index, **choice_object(choice)} for index, choice in enumerate(outcome.choices)]
    if outcome.prompt_logprobs:
        result["prompt_logprobs"] = logprobs_objects(outcome.prompt_logprobs)
    result["usage"] = usage_object(outcome.usage)
    return result


def openai_result(request: BatchRequest, outcome: Generation, model: str, *, created_at_s: int | None = None) -> dict[str, Any]:
    """The output object of an OpenAI line, and its number as "line". `created_at_s` is Unix time; None: now."""
    body = {
        "id": f"cmpl-{request.line}",
        "object": "text_completion",
        "created": int(time.time()) if created_at_s is None else created_at_s,
        "model": model,
        "choices": [_openai_choice(index, choice) for index, choice in enumerate(outcome.choices)],
        "usage": token_counts(outcome.usage),
    }
    return {
        "id": f"batch_req_{request.line}",
        "custom_id": request.custom_id,
        "response": {"status_code": 200, "request_id": f"req_{request.line}", "body": body},
        "error": None,
        "line": request.line,
    }


def _openai_choice(index: int, choice: Choice) -> dict[str, Any]:
    logprobs = _openai_logprobs(choice.logprobs) if choice.logprobs else None
    return {"index": index, "text": choice.text, "finish_reason": choice.finish_reason, "logprobs": logprobs}


def _openai_logprobs(logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Tokens are named by their ids, as vLLM does with return_tokens_as_token_ids: pieces of characters have no text."""
    return {
        "tokens": [_token_name(token.token_id) for token in logprobs],
        "token_logprobs": [token.logprob for token in logprobs],
        "top_logprobs": [{_token_name(other.token_id): other.logprob for other in token.top} for token in logprobs],
    }


def _token_name(token_id: int) -> str:
    return f"token_id:{token_id}"
