"""One pass over a stage's units: each is brought here, computed over every batch of every step, and let go.

This is FlexLLMGen's zig-zag block schedule: weights are loaded once for a whole block of batches. While one batch is
computed, the keys and values, and the hidden states, of the next are on their way. Shapes: T rows, R rows that tokens are made
of, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from asyncpipe_workers.indices import indices
from asyncpipe_workers.layout import Batch, StepLayout
from asyncpipe_workers.memory.activations import Activations
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.memory.weights import WeightStore
from asyncpipe_workers.models.units import StageUnits, Unit


@dataclass(slots=True)
class Work:
    """One step on its way through the units. `input_T` are its tokens, or `(T, D)` hidden states of the stage before."""

    number: int  # in the pass
    layout: StepLayout
    input_T: torch.Tensor
    batches: list[Batch]
    scored_rows: list[int] = field(default_factory=list)  # whose logits are wanted beside those of the sampled ones

    def only_continues(self, max_rows: int) -> bool:
        """Whether all it does is to continue some sequences, no more than so many."""
        layout = self.layout
        return not (layout.spans or layout.padding or self.scored_rows) and 0 < len(layout.rows) <= max_rows


class Result(NamedTuple):
    """Of a step: hidden states (T, D), or on the last stage logits of the sampled rows (R, V), then of the scored ones."""

    work: Work
    output: torch.Tensor


class _Visit(NamedTuple):
    """A batch that a unit is computed for."""

    work: Work
    number: int  # of the batch in its step
    batch: Batch

    @property
    def key(self) -> tuple[int, int]:
        return self.work.number, self.number


class Sweep:
    def __init__(
        self, units: StageUnits, weights: WeightStore, cache: KVCache, activations: Activations, *, overlap: bool
    ) -> None:
        self._units = units
        self._weights = weights
        self._cache = cache
        self._activations = activations
        self._overlap = overlap
        self._sequence = sequence_of(units)

    def run(self, works: Sequence[Work]) -> Iterator[Result]:
        """Results in the order of `works`, each as soon as it is there."""
        visits = [_Visit(work, index, batch) for work in works for index, batch in enumerate(work.batches)]
        number = 0
        if self._units.embedding is not None:
            self._embed(visits)
            number = 1
        else:
            for visit in visits:
                self._activations.put(visit.key, visit.work.input_T[visit.batch.rows])
        last = number + len(self._units.layers) - 1
        is_final = self._units.head_input is None
        for index, unit in enumerate(self._units.layers, start=number):
            yield from self._layer(index, unit, visits, gives_results=is_final and index == last)
        if not is_final:
            yield from self._head(works)

    def run_step(self, work: Work, layers: Callable[[torch.Tensor, StepLayout], torch.Tensor]) -> Iterator[Result]:
        """A step of one batch, where all is on the device: `layers` computes them all, and what it gives may change later."""
        hidden_TD = work.input_T
        if self._units.embedding is not None:
            hidden_TD = self._weights.acquire(0)(work.input_T, work.layout.positions_T)
        hidden_TD = layers(hidden_TD, work.layout)
        if self._units.head_input is None:
            yield Result(work, hidden_TD.clone())
            return
        self._activations.put((work.number, 0), hidden_TD)
        yield from self._head([work])

    def _embed(self, visits: Sequence[_Visit]) -> None:
        embedding = self._weights.acquire(0)
        for visit in visits:
            tokens_T = visit.work.input_T[visit.batch.rows]
            self._activations.put(visit.key, embedding(tokens_T, visit.batch.layout.positions_T))
        self._weights.release(0)

    def _layer(self, index: int, unit: Unit[Any], visits: Sequence[_Visit], *, gives_results: bool) -> Iterator[Result]:
        if self._overlap:
            self._fetch_ahead(unit, index, visits, 0)
        layer = self._weights.acquire(index)
        parts: list[torch.Tensor] = []
        for number, visit in enumerate(visits):
            if self._overlap:
                self._fetch_ahead(unit, index, visits, number + 1)
            hidden_TD = layer(self._activations.take(visit.key), visit.batch.layout, self._cache)
            if not gives_results:
                self._activations.put(visit.key, hidden_TD)
                continue
            parts.append(hidden_TD)
            if visit.number == len(visit.work.batches) - 1:
                yield Result(visit.work, _joined(parts))
                parts = []
        self._weights.release(index)

    def _fetch_ahead(self, unit: Unit[Any], index: int, visits: Sequence[_Visit], number: int) -> None:
        """What the visit after the one at hand needs; after a unit's last one comes the next attention's first."""
        if number < len(visits):
            self._activations.prefetch(visits[number].key)
            if unit.cache_layer is not None:
                self._cache.prefetch(unit.cache_layer, visits[number].batch.layout)
            return
        for following in self._sequence[index + 1 :]:
            if following.cache_layer is not None:
                self._cache.prefetch(following.cache_layer, visits[0].batch.layout)
                return

    def _head(self, works: Sequence[Work]) -> Iterator[Result]:
        """Logits, a block of the vocabulary at a time, of the rows that need them."""
        index = len(self._sequence) - len(self._units.logits) - 1
        head_input = self._weights.acquire(index)
        inputs = [head_input(self._rows_for_head(work)) for work in works]
        self._weights.release(index)
        logits: list[list[torch.Tensor]] = [[] for _ in works]
        for number in range(index + 1, len(self._sequence)):
            project = self._weights.acquire(number)
            for parts, x_RE in zip(logits, inputs, strict=True):
                parts.append(project(x_RE))
            self._weights.release(number)
        for work, parts in zip(works, logits, strict=True):
            yield Result(work, _joined(parts, dim=1))

    def _rows_for_head(self, work: Work) -> torch.Tensor:
        hidden_TD = _joined([self._activations.take((work.number, index)) for index in range(len(work.batches))])
        rows_R = work.layout.sampled_rows
        if rows_R is None:
            rows_R = indices([], hidden_TD.device)
        if work.scored_rows:
            rows_R = torch.cat([rows_R, indices(work.scored_rows, hidden_TD.device)])
        return hidden_TD[rows_R]


def sequence_of(units: StageUnits) -> list[Unit[Any]]:
    """All units in the order of their use."""
    first = [] if units.embedding is None else [units.embedding]
    last = [] if units.head_input is None else [units.head_input]
    return [*first, *units.layers, *last, *units.logits]


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
