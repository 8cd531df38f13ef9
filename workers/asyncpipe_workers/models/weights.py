"""How a block of a model asks for its tensors, wherever they are.

A block (an attention, a feed-forward, an embedding …) is built from a `Weights`, by the checkpoint's names and shapes. So the
same few lines build it from tensors that stay (`Resident`), from a buffer that is filled anew for every step (`StreamedWeights`
in memory/weights.py), or only to learn which tensors it needs (`Recorder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from asyncpipe_workers.memory.quantization import Codec
from asyncpipe_workers.models.kernels import FloatLinears, PlainLinear, ResidentLinear, fits, project
from asyncpipe_workers.models.quantized import QuantizedLinears

Projection = Callable[[torch.Tensor], torch.Tensor]
"""(..., in) to (..., out); the result is nobody else's, and may be written to."""


class Rows(NamedTuple):
    """One of the projections that share an input: `<name>.weight` is (size, in), `<name>.bias` (size,)."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b. `parts` are blocks of W's rows, each (out, in), in order: often one, more when they are on two tiers."""

    parts: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ys = [project(x, part) for part in self.parts]
        y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class TransposedLinear:
    """y = x W + b. `parts` are blocks of W's rows, each (in, out), in order."""

    parts: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y, first = None, 0
        for part in self.parts:
            product = torch.matmul(x[..., first : first + len(part)], part)
            y = product if y is None else y.add_(product)
            first += len(part)
        assert y is not None  # noqa: S101 - a matrix has rows
        return y if self.bias is None else y.add_(self.bias)


class Table(Protocol):
    """Rows of a matrix by their numbers."""

    def __call__(self, indices_T: torch.Tensor) -> torch.Tensor:
        """(T, row length)."""
        ...


@dataclass(frozen=True, slots=True)
class ResidentTable:
    """What is looked up is of `dtype`, whatever the rows are kept in."""

    rows: torch.Tensor
    dtype: torch.dtype

    def __call__(self, indices_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices_T, self.rows).to(self.dtype)


class Weights(Protocol):
    def vector(self, name: str, size: int) -> torch.Tensor:
        """(size,)."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Of any shape, as it is; only where weights stay."""
        ...

    def linear(self, rows: Sequence[Rows], in_size: int, *, bias: bool) -> Projection:
        """The projections of one input, one after the other, as one."""
        ...

    def transposed(self, name: str, in_size: int, out_size: int, *, bias: bool) -> Projection:
        """Of a `<name>.weight` that is stored as (in, out)."""
        ...

    def head(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> Projection:
        """Rows [first, last) of the matrix `name` of shape `of` as a projection. It may be a table too."""
        ...

    def table(self, name: str, num_rows: int, size: int) -> Table:
        """A matrix of which only some rows are needed at a time."""
        ...


class Parts(Protocol):
    """Tensors as blocks of rows, of which `linear_of_parts` and its like make projections."""

    def vector(self, name: str, size: int) -> torch.Tensor: ...

    def rows(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> list[torch.Tensor]: ...


def linear_of_parts(parts: Parts, rows: Sequence[Rows], in_size: int, *, bias: bool) -> Linear:
    blocks = [block for name, size in rows for block in parts.rows(f"{name}.weight", 0, size, of=(size, in_size))]
    biases = [parts.vector(f"{name}.bias", size) for name, size in rows] if bias else []
    return Linear(joined(blocks), end_to_end(biases) if biases else None)


def transposed_of_parts(parts: Parts, name: str, in_size: int, out_size: int, *, bias: bool) -> TransposedLinear:
    blocks = parts.rows(f"{name}.weight", 0, in_size, of=(in_size, out_size))
    return TransposedLinear(joined(blocks), parts.vector(f"{name}.bias", out_size) if bias else None)


def end_to_end(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One vector of several. To do so with those that only have a shape, torch would import its compiler, for a second."""
    first = vectors[0]
    if len(vectors) == 1:
        return first
    if first.device.type == "meta":
        return torch.empty(sum(map(len, vectors)), device="meta")
    return torch.cat(list(vectors))


def joined(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Blocks of rows that lie one after the other in memory are one."""
    blocks = list(parts[:1])
    for part in parts[1:]:
        last = blocks[-1]
        is_next = last.device.type != "meta" and last.data_ptr() + last.nbytes == part.data_ptr()
        if is_next and last.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
            blocks[-1] = torch.as_strided(last, (len(last) + len(part), last.shape[1]), last.stride())
        else:
            blocks.append(part)
    return tuple(blocks)


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

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        self.wanted.append(Wanted(name, shape, 0, shape[0] if shape else 1))
        return torch.empty(shape, device="meta")

    def rows(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> list[torch.Tensor]:
        self.wanted.append(Wanted(name, of, first, last))
        return [torch.empty(last - first, of[1], device="meta")]

    def linear(self, rows: Sequence[Rows], in_size: int, *, bias: bool) -> Projection:
        return linear_of_parts(self, rows, in_size, bias=bias)

    def transposed(self, name: str, in_size: int, out_size: int, *, bias: bool) -> Projection:
        return transposed_of_parts(self, name, in_size, out_size, bias=bias)

    def head(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> Projection:
        return Linear(joined(self.rows(name, first, last, of=of)), None)

    def table(self, name: str, num_rows: int, size: int) -> Table:
        self.wanted.append(Wanted(name, (num_rows, size), 0, num_rows, is_lookup=True))
        return ResidentTable(torch.empty(num_rows, size, device="meta"), torch.float32)


class Source(Protocol):
    """Where a model's tensors come from, by the names that its code uses."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Nobody else has it."""
        ...

    def has_packed(self, name: str, shape: tuple[int, ...], codec: Codec) -> bool:
        """Whether it is stored as `read_packed` gives it."""
        ...

    def read_packed(self, name: str, shape: tuple[int, ...], codec: Codec) -> torch.Tensor:
        """A matrix (O, I) as rows of `codec`'s, (O, B) uint8. Nobody else has it."""
        ...


class Resident:
    """Tensors on the device, read once each; `make_linear` gives matrices the form in which they are multiplied, which may be
    the only one that is kept. Matrices and tables stay in the type in which they are stored where `dtype` would say no more."""

    def __init__(
        self, source: Source, *, dtype: torch.dtype, device: torch.device, make_linear: FloatLinears | QuantizedLinears
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self._make_linear = make_linear
        self._tables: dict[str, torch.Tensor] = {}
        self.num_params = self.num_bytes = 0

    def vector(self, name: str, size: int) -> torch.Tensor:
        return self.tensor(name, (size,))

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._kept(self._read(name, shape).to(self._dtype))

    def linear(self, rows: Sequence[Rows], in_size: int, *, bias: bool) -> Projection:
        biases = [self.vector(f"{name}.bias", size) for name, size in rows] if bias else []
        joint_bias = torch.cat(biases) if biases else None
        if isinstance(self._make_linear, QuantizedLinears):
            return self._counted(self._make_linear.of_packed(self._read_packed(rows, in_size), in_size, joint_bias))
        matrices = [self._read(f"{name}.weight", (size, in_size)) for name, size in rows]
        return self._made(_one(matrices), joint_bias)

    def transposed(self, name: str, in_size: int, out_size: int, *, bias: bool) -> Projection:
        weight = self._read(f"{name}.weight", (in_size, out_size)).t().contiguous()
        return self._made(weight, self.vector(f"{name}.bias", out_size) if bias else None)

    def head(self, name: str, first: int, last: int, *, of: tuple[int, int]) -> Projection:
        if isinstance(self._make_linear, QuantizedLinears) and self._source.has_packed(name, of, self._make_linear.codec):
            packed = self._source.read_packed(name, of, self._make_linear.codec)
            self.num_params += 0 if name in self._tables else of[0] * of[1]
            return self._counted(self._make_linear.of_packed(packed[first:last], of[1], None))
        table = self._tables.get(name)
        whole = self._read(name, of) if table is None else table
        linear = self._make_linear(whole[first:last], None)
        is_table = table is not None and table.dtype == self._dtype and isinstance(linear, PlainLinear)
        return linear if is_table else self._counted(linear)

    def table(self, name: str, num_rows: int, size: int) -> Table:
        if name not in self._tables:
            self._tables[name] = self._kept(self._read(name, (num_rows, size)))
        return ResidentTable(self._tables[name], self._dtype)

    def _made(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
        return self._counted(self._make_linear(weight, bias))

    def _counted(self, linear: ResidentLinear) -> Projection:
        self.num_bytes += linear.num_bytes
        return linear

    def _read_packed(self, rows: Sequence[Rows], in_size: int) -> torch.Tensor:
        assert isinstance(self._make_linear, QuantizedLinears)  # noqa: S101 - the callers' condition
        codec = self._make_linear.codec
        self.num_params += sum(size for _, size in rows) * in_size
        return _one([self._source.read_packed(f"{name}.weight", (size, in_size), codec) for name, size in rows])

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_bytes += tensor.nbytes
        return tensor

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """In the type that it is stored in, if that says no more than `dtype`."""
        stored = self._source.read(name, shape)
        self.num_params += stored.numel()
        return stored.to(device=self._device, dtype=stored.dtype if fits(stored.dtype, self._dtype) else self._dtype)


def _one(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Without a copy where they lie one after the other."""
    blocks = joined(matrices)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
