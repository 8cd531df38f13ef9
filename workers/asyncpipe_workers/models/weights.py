"""How a block of a model asks for its tensors, wherever they are.

A block (an attention, a feed-forward, an embedding …) is built from a `Weights`, by the checkpoint's names and shapes. So the
same few lines build it from tensors that stay (`resident`), from a buffer that is filled anew for every step (`streamed`), or
only to learn which tensors it needs (`Recorder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from asyncpipe_workers.models.kernels import project


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b. `parts` are blocks of W's rows, each (out, in), in order: often one, more when they are on two tiers."""

    parts: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ys = [project(x, part) for part in self.parts]
        y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)
        return y if self.bias is None else y.add_(self.bias)


class Table(Protocol):
    """Rows of a matrix by their numbers."""

    def __call__(self, indices_T: torch.Tensor) -> torch.Tensor:
        """(T, row length)."""
        ...


@dataclass(frozen=True, slots=True)
class ResidentTable:
    rows: torch.Tensor

    def __call__(self, indices_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices_T, self.rows)


class Weights(Protocol):
    def vector(self, name: str, size: int) -> torch.Tensor:
        """(size,)."""
        ...

    def matrix(self, names: Sequence[str], out_size: int, in_size: int) -> tuple[torch.Tensor, ...]:
        """Blocks of rows, in order, of the matrices of these names, (out_size, in_size) each, one below the other."""
        ...

    def rows(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Rows [first, last) of a matrix of shape `of`, as blocks of rows."""
        ...

    def table(self, name: str, num_rows: int, size: int) -> Table:
        """A matrix of which only some rows are needed at a time."""
        ...


class Wanted(NamedTuple):
    """Rows [first, last) of a tensor that a block asked for."""

    name: str
    shape: tuple[int, ...]
    first: int
    last: int
    is_lookup: bool = False  # single rows are wanted, not all of them


class Recorder:
    """Notes what a block asks for; the tensors it gives have shapes and nothing else."""

    def __init__(self) -> None:
        self.wanted: list[Wanted] = []

    def vector(self, name: str, size: int) -> torch.Tensor:
        self.wanted.append(Wanted(name, (size,), 0, size))
        return torch.empty(size, device="meta")

    def matrix(self, names: Sequence[str], out_size: int, in_size: int) -> tuple[torch.Tensor, ...]:
        self.wanted += [Wanted(name, (out_size, in_size), 0, out_size) for name in names]
        return (torch.empty(len(names) * out_size, in_size, device="meta"),)

    def rows(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        self.wanted.append(Wanted(name, of, first, last))
        return (torch.empty(last - first, of[1], device="meta"),)

    def table(self, name: str, num_rows: int, size: int) -> Table:
        self.wanted.append(Wanted(name, (num_rows, size), 0, num_rows, is_lookup=True))
        return ResidentTable(torch.empty(num_rows, size, device="meta"))


class Source(Protocol):
    """Where a model's tensors come from, by the names that its code uses."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...


class Resident:
    """Tensors on the device in the dtype to compute in, read once each."""

    def __init__(self, source: Source, *, dtype: torch.dtype, device: torch.device) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self._tables: dict[str, torch.Tensor] = {}
        self.num_params = self.num_bytes = 0

    def vector(self, name: str, size: int) -> torch.Tensor:
        return self._read(name, (size,))

    def matrix(self, names: Sequence[str], out_size: int, in_size: int) -> tuple[torch.Tensor, ...]:
        parts = [self._read(name, (out_size, in_size)) for name in names]
        return (torch.cat(parts) if len(parts) > 1 else parts[0],)

    def rows(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        return (self._whole(name, of)[first:last],)

    def table(self, name: str, num_rows: int, size: int) -> Table:
        return ResidentTable(self._whole(name, (num_rows, size)))

    def _whole(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """Shared by those who ask again: a tied head is the embedding."""
        if name not in self._tables:
            self._tables[name] = self._read(name, shape)
        return self._tables[name]

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        # A copy, so that the checkpoint's mapped file can be let go.
        tensor = self._source.read(name, shape).to(device=self._device, dtype=self._dtype, copy=True)
        self.num_params += tensor.numel()
        self.num_bytes += tensor.nbytes
        return tensor
