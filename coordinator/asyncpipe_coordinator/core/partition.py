"""Which decoder layers each stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asyncpipe.errors import Invalid


class LayerRange(NamedTuple):
    """Layers `first` up to, not including, `last`."""

    first: int
    last: int


def split_layers(num_layers: int, num_stages: int, split: Sequence[int] | None = None) -> tuple[LayerRange, ...]:
    """Contiguous ranges, one a stage; the first `num_layers mod num_stages` stages hold one layer more.

    `split` gives the counts by hand. Raises Invalid when there are fewer layers than stages, or the counts do not fit.
    """
    counts = _even_counts(num_layers, num_stages) if split is None else _checked(split, num_layers, num_stages)
    ranges, first = [], 0
    for count in counts:
        ranges.append(LayerRange(first, first + count))
        first += count
    return tuple(ranges)


def _even_counts(num_layers: int, num_stages: int) -> list[int]:
    if num_stages > num_layers:
        raise Invalid(f"--stages {num_stages}: the model has {num_layers} layers, so use 1 to {num_layers} stages")
    share, rest = divmod(num_layers, num_stages)
    return [share + (stage < rest) for stage in range(num_stages)]


def _checked(split: Sequence[int], num_layers: int, num_stages: int) -> list[int]:
    text = ",".join(map(str, split))
    if len(split) != num_stages:
        raise Invalid(f"--split {text} has {len(split)} parts for {num_stages} stages; give one count for each stage")
    if min(split) < 1:
        raise Invalid(f"--split {text}: every stage needs at least one layer")
    if sum(split) != num_layers:
        raise Invalid(f"--split {text} adds up to {sum(split)} layers; the model has {num_layers}")
    return list(split)
