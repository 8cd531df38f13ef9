"""A stage's layers as *units*: what is loaded, computed over the whole block of batches, and let go, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models.weights import Projection, Recorder, Wanted, Weights

B = TypeVar("B", covariant=True)


class Layer(Protocol):
    """Hidden states (T, D) to hidden states (T, D)."""

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor: ...


class Embedding(Protocol):
    """Tokens and their positions to hidden states (T, D)."""

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Unit(Generic[B]):
    """`build` makes it from weights. `cache_layer` is the layer of the cache that it attends to, None for none."""

    name: str
    build: Callable[[Weights], B]
    cache_layer: int | None = None
    wanted: tuple[Wanted, ...] = field(init=False)

    def __post_init__(self) -> None:
        recorder = Recorder()
        self.build(recorder)
        object.__setattr__(self, "wanted", tuple(recorder.wanted))


@dataclass(frozen=True)
class StageUnits:
    """All of a stage, in order. The last stage's head is `head_input`, (R, D) to (R, E), then logits (R, v) of a block of the
    vocabulary for each of `logits`."""

    embedding: Unit[Embedding] | None
    layers: tuple[Unit[Layer], ...]
    head_input: Unit[Projection] | None = None
    logits: tuple[Unit[Projection], ...] = ()
