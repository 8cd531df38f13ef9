"""A stage's layers as *units*: what is loaded, computed over the whole block of batches, and let go, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models.weights import Projection, Recorder, Wanted, Weights

B = TypeVar("B", covariant=True)


class Layer(Protocol):
    """Hidden states (T, D) to hidden states (T, D)."""

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache, /) -> torch.Tensor: ...


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


@dataclass(frozen=True)
class Blocks:
    """What a family builds a stage's blocks with, each from `weights`:

    `embedding(weights)`; `attention(weights, index=, cache_layer=)` and `feed_forward(weights, index=)`, both with their norms
    and residual connections; `head_input(weights)`, and `logits(weights, first=, last=)` of a part of the vocabulary.
    """

    embedding: Callable[..., Embedding]
    attention: Callable[..., Layer]
    feed_forward: Callable[..., Layer]
    head_input: Callable[..., Projection]
    logits: Callable[..., Projection]

    @classmethod
    def of(cls, config: object, **builders: Callable[..., Any]) -> Blocks:
        """Of builders that take `config=` too."""
        return cls(**{name: functools.partial(build, config=config) for name, build in builders.items()})


class WholeLayer:
    """Attention and feed-forward, for schedules that do not tell them apart."""

    def __init__(self, weights: Weights, blocks: Blocks, index: int, cache_layer: int) -> None:
        self.attention = blocks.attention(weights, index=index, cache_layer=cache_layer)
        self.feed_forward = blocks.feed_forward(weights, index=index)

    def __call__(self, hidden_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        return self.feed_forward(self.attention(hidden_TD, layout, cache), layout, cache)


def stage_units(
    blocks: Blocks, *, first: int, last: int, num_layers: int, vocab_size: int, separate: bool, logits_rows: int | None
) -> StageUnits:
    """Decoder layers [first, last), with the embedding before the first layer and the head after the last.

    `separate` layers are two units each. `logits_rows` cuts the head into blocks of so many tokens.
    """
    layers = tuple(
        unit for index in range(first, last) for unit in _layer_units(blocks, index, index - first, separate=separate)
    )
    embedding = Unit("embedding", blocks.embedding) if first == 0 else None
    if last < num_layers:
        return StageUnits(embedding, layers)
    step = logits_rows or vocab_size
    bounds = [(row, min(row + step, vocab_size)) for row in range(0, vocab_size, step)]
    logits = [Unit(f"head, tokens {a} to {b - 1}", functools.partial(blocks.logits, first=a, last=b)) for a, b in bounds]
    return StageUnits(embedding, layers, Unit("head", blocks.head_input), tuple(logits))


def _layer_units(blocks: Blocks, index: int, cache_layer: int, *, separate: bool) -> list[Unit[Layer]]:
    name = f"layer {index}"
    if not separate:
        whole = functools.partial(WholeLayer, blocks=blocks, index=index, cache_layer=cache_layer)
        return [Unit(name, whole, cache_layer)]
    attention = functools.partial(blocks.attention, index=index, cache_layer=cache_layer)
    return [
        Unit(f"{name} attention", attention, cache_layer),
        Unit(f"{name} feed-forward", functools.partial(blocks.feed_forward, index=index)),
    ]
