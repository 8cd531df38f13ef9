"""How tokens are chosen, and what is told about a choice."""

from __future__ import annotations

import enum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from asyncpipe.wire.fields import MAX_CONTEXT_TOKENS, Count, Seed, TokenId

MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 256
MAX_BIASED_TOKENS = 1024
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 64

StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The parameters of a request; the defaults are greedy decoding up to the end of the context.

    Penalties and biases change the logits before anything else: `repetition_penalty` divides positive and multiplies negative
    logits of every token of the prompt and the text so far (Keskar et al. 2019, "CTRL"); `presence_penalty` and
    `frequency_penalty` are subtracted for generated tokens, once or per occurrence (OpenAI's definition); `logit_bias` is
    added. Then `temperature` divides (0.0: the likeliest token is taken), and `top_k` (0: off), `top_p` and `min_p` (relative
    to the likeliest token's probability) keep the likely tokens, in this order.
    """

    max_new_tokens: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=2**31)] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_BIASED_TOKENS)] = (
        msgspec.field(default_factory=dict)
    )
    seed: Seed | None = None  # None: fresh entropy
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKENS)] = ()
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)] = 0
    ignore_eos: bool = False
    logprobs: NumLogprobs | None = None  # log-probabilities of generated tokens, with so many alternatives
    prompt_logprobs: NumLogprobs | None = None  # the same of the prompt's tokens


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_new_tokens or the end of the context
    CANCELLED = "cancelled"


class Alternative(NamedTuple):
    token_id: TokenId
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of the model's own probabilities (before penalties and temperature).

    `rank` is 1 for the likeliest token. `top` are the likeliest alternatives, best first.
    """

    token_id: TokenId
    logprob: float
    rank: Count
    top: Annotated[tuple[Alternative, ...], Meta(max_length=MAX_TOP_LOGPROBS)] = ()
