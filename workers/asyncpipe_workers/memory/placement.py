"""From a policy's percentages to the rows of each tensor that live on each tier. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from asyncpipe.policy import Placement, Shares


class Sized(NamedTuple):
    """A tensor as it is stored: rows of equal length; vectors are one row."""

    name: str
    num_rows: int
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


class Rows(NamedTuple):
    """How many of a tensor's rows are on the device and on the host, in this order; the rest is on disk."""

    device: int
    host: int


Groups = Sequence[Sequence[Sized]]
"""Tensors in the order of use, grouped by the part of a layer that they belong to."""


def place(groups: Groups, shares: Shares, placement: Placement) -> dict[str, Rows]:
    rule: Callable[[Groups, Shares], dict[str, Rows]] = {
        Placement.EXACT: place_exactly,
        Placement.FLEXLLMGEN: place_by_midpoints,
    }[placement]
    return rule(groups, shares)


def place_exactly(groups: Groups, shares: Shares) -> dict[str, Rows]:
    """Every group has each tier's share of its bytes, to half a row; what rounding leaves over, the next group gets."""
    placed: dict[str, Rows] = {}
    total = device = host = 0
    for group in groups:
        total += sum(tensor.num_bytes for tensor in group)
        for tensor in group:
            on_device = _rows_for(total * shares.device / 100 - device, tensor, most=tensor.num_rows)
            device += on_device * tensor.row_bytes
            on_host = 0
            if on_device < tensor.num_rows:
                on_host = _rows_for(total * shares.host / 100 - host, tensor, most=tensor.num_rows - on_device)
                host += on_host * tensor.row_bytes
            placed[tensor.name] = Rows(on_device, on_host)
    return placed


def _rows_for(num_bytes: float, tensor: Sized, *, most: int) -> int:
    return min(max(int(num_bytes / tensor.row_bytes + 0.5), 0), most)


def place_by_midpoints(groups: Groups, shares: Shares) -> dict[str, Rows]:
    """FlexLLMGen's rule: a whole tensor goes where the middle of its bytes lies, in the order disk, host, device.

    So what is realised is often far from what was asked for. Biases follow their weights, as in its files.
    """
    placed: dict[str, Rows] = {}
    for group in groups:
        ordered = _biases_after_weights(group)
        total, before = sum(tensor.num_bytes for tensor in ordered), 0
        for tensor in ordered:
            middle = 100 * (before + tensor.num_bytes / 2) / total
            before += tensor.num_bytes
            if middle < shares.disk:
                placed[tensor.name] = Rows(0, 0)
            elif middle < shares.disk + shares.host:
                placed[tensor.name] = Rows(0, tensor.num_rows)
            else:
                placed[tensor.name] = Rows(tensor.num_rows, 0)
    return placed


def _biases_after_weights(group: Sequence[Sized]) -> list[Sized]:
    order: dict[str, int] = {}
    for tensor in group:
        order.setdefault(_owner(tensor.name), len(order))
    return sorted(group, key=lambda tensor: order[_owner(tensor.name)])


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
