"""Tokens from logits: the parameters against Hugging Face and their definitions, and what a draw may depend on.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from asyncpipe.wire.messages import Sampling
from asyncpipe_workers.sampling import LIKELY, Sampled, Sampler, sample, score

SMALL, LARGE = 60, 50_272
ALMOST_ONE = 1 - 2.0**-53
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class GivenUniform(Sampler):
    """Draws with `uniform` rather than with its seed's number."""

    uniform = 0.0

    def _uniform(self) -> float:
        return self.uniform


def new(prompt: Sequence[int] = (1,), generated: Sequence[int] = (), *, ends: Sequence[int] = (), **options: Any) -> Sampler:
    return _new(Sampler, prompt, generated, ends, options)


def steered(prompt: Sequence[int] = (1,), generated: Sequence[int] = (), **options: Any) -> GivenUniform:
    return _new(GivenUniform, prompt, generated, (), options)


def _new[S: Sampler](kind: type[S], prompt: Sequence[int], generated: Sequence[int], ends: Sequence[int], options: Any) -> S:
    sampling = Sampling(**({"temperature": 1.0} | options))
    return kind(sampling, [*prompt, *generated], num_prompt=len(prompt), eos_token_ids=frozenset(ends))
