"""How tokens are chosen, as users write it, checked before it travels."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    seed: int | None
    """The same seed gives the same tokens; None draws a fresh one."""
    stop: str | Sequence[str]
    """End before any of these texts would appear."""
    ignore_eos: bool
    """Go on after the end-of-sequence token."""


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
