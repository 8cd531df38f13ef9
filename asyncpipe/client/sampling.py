"""How tokens are chosen, as users write it, checked before it travels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypedDict

import msgspec

from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import Sampling


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; all optional."""

    max_new_tokens: int | None
    """At most so many tokens; None: until the end-of-sequence token or the end of the model's context."""
    temperature: float
    """0.0 (the default) always takes the likeliest token; 1.0 samples from the model's own distribution."""
    top_k: int
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: float
    """Sample among the likeliest tokens that together reach this probability; 1.0 is off."""
    min_p: float
    """Sample among tokens at least so likely, relative to the likeliest one; 0.0 is off."""
    repetition_penalty: float
    """Above 1.0: tokens of the prompt and the text so far become less likely."""
    presence_penalty: float
    """Subtracted from the logits of tokens that were generated already; -2.0 to 2.0."""
    frequency_penalty: float
    """The same, for each time that the token was generated."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these tokens; -100 forbids, 100 forces."""
    seed: int | None
    """The same seed gives the same tokens; None draws a fresh one."""
    n: int
    """So many texts for one prompt; see `Generation.choices`."""
    stop: str | Sequence[str]
    """End before any of these texts would appear."""
    stop_token_ids: Sequence[int]
    """End with any of these tokens."""
    min_tokens: int
    """Neither the end-of-sequence token nor a stop ends the text before it has so many tokens."""
    ignore_eos: bool
    """Go on after the end-of-sequence token."""
    logprobs: int | None
    """Give each token's log-probability, and so many alternatives (0 to 20)."""
    prompt_logprobs: int | None
    """The same for the prompt's tokens, in `Generation.prompt_logprobs`."""


def make_sampling(options: SamplingOptions) -> Sampling:
    """The wire form of `options`. Raises Invalid with the parameter's name and its legal range."""
    fields: dict[str, object] = dict(options)
    stop = fields.get("stop", ())
    fields["stop"] = (stop,) if isinstance(stop, str) else stop
    unknown = fields.keys() - Sampling.__struct_fields__
    if unknown:
        raise Invalid(f"unknown parameter {min(unknown)!r}; known: {', '.join(Sampling.__struct_fields__)}")
    try:
        return msgspec.convert(fields, Sampling)
    except msgspec.ValidationError as error:
        raise Invalid(_explain(str(error), fields)) from None


def _explain(problem: str, fields: dict[str, object]) -> str:
    """From "Expected `float` >= 0.0 - at `$.temperature`" to a line that a user understands."""
    expected, _, path = problem.partition(" - at ")
    found = re.search(r"\$\.(\w+)", path)
    name = found[1] if found else "parameters"
    return f"{name} = {fields.get(name)!r}: {expected[:1].lower()}{expected[1:].replace('`', '')}"
