"""A model's tensors in the form in which they are stored, by rows, so that no more is in memory than is wanted.

A stored tensor is rows of bytes: of its numbers as they are, or of codes of few bits (`Codec`). Vectors are one row.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from asyncpipe.policy import is_compressible
from asyncpipe.tensor_names import quantized_suffix
from asyncpipe_workers.checkpoint import Checkpoint, FileRange
from asyncpipe_workers.memory.disk import BLOCK_BYTES, DiskFiles, aligned_down, aligned_up, new_buffer
from asyncpipe_workers.memory.quantization import Codec, make_codec

CHUNK_BYTES = 16 << 20  # of rows read, or packed, at once
DUMMY_STD = 0.02
DUMMY_POOL = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredForm:
    """Of a tensor of `shape`: `codec` None means plain numbers of `dtype`. `place` is where its bytes are, row by row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    codec: Codec | None
    place: FileRange | None

    @property
    def num_rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_len(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return self.codec.packed_size(self.row_len) if self.codec else self.row_len * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    def unpack(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """`rows` (n, row_bytes) uint8 to numbers in `out` (n, row_len)."""
        if self.codec is not None:
            self.codec.decode(rows, self.row_len, dtype=out.dtype, out=out)
        else:
            out.copy_(self.numbers(rows))

    def numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """Plain rows as what they are, (n, row_len), without a copy where they are aligned to their type."""
        if rows.storage_offset() % self.dtype.itemsize:
            rows = rows.clone()
        return rows.view(self.dtype)


class TensorSource(Protocol):
    """Names and shapes are those that the model's code uses."""

    def form(self, name: str, shape: tuple[int, ...]) -> StoredForm:
        """Raises Invalid for a tensor that is not there, or has another shape."""
        ...

    def chunks(self, form: StoredForm, first: int, last: int) -> Iterator[torch.Tensor]:
        """Rows [first, last) as bytes, some at a time: (n, row_bytes) uint8, valid until the next."""
        ...

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """All of it, as numbers."""
        ...

    def read_packed(self, name: str, shape: tuple[int, ...], codec: Codec, out: torch.Tensor) -> None:
        """All rows in the codec's form, (n, packed bytes) uint8."""
        ...


def _read_packed(source: TensorSource, form: StoredForm, codec: Codec, out: torch.Tensor) -> None:
    """As they are, if they are packed so, or packed some at a time."""
    for rows, target in _chunks_into(out, source, form):
        if _is_packed_by(codec, form):
            target.copy_(rows)
        else:
            numbers = torch.empty(len(rows), form.row_len, dtype=torch.float32 if form.codec else form.dtype)
            form.unpack(rows, numbers)
            target.copy_(codec.encode(numbers))


def _is_packed_by(codec: Codec, form: StoredForm) -> bool:
    return form.codec is not None and form.codec.compression == codec.compression


def _chunks_into(target: torch.Tensor, source: TensorSource, form: StoredForm) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All rows as bytes, some at a time, each time with the rows of `target` that they are for."""
    row = 0
    for rows in source.chunks(form, 0, form.num_rows):
        yield rows, target[row : row + len(rows)]
        row += len(rows)


def _rows_per_chunk(row_bytes: int) -> int:
    return max(CHUNK_BYTES // row_bytes, 1)


class CheckpointSource:
    """A checkpoint's tensors; with `codec`, its matrices are packed as they are read, unless they are packed already."""

    def __init__(self, checkpoint: Checkpoint, files: DiskFiles, *, codec: Codec | None = None) -> None:
        self._checkpoint = checkpoint
        self._files = files
        self._codec = codec
        self._names = frozenset(checkpoint.names())
        quantization = checkpoint.quantization
        self._packed_codec = make_codec(quantization) if quantization else None
        self._suffix = quantized_suffix(quantization.num_bits) if quantization else ""

    def form(self, name: str, shape: tuple[int, ...]) -> StoredForm:
        if self._packed_codec is not None and name + self._suffix in self._names:
            packed_shape = (*shape[:-1], self._packed_codec.packed_size(shape[-1]))
            place = self._checkpoint.locate(name + self._suffix, packed_shape)
            return StoredForm(name, shape, torch.uint8, self._packed_codec, place)
        plain = self._plain_form(name, shape)
        if self._codec is None or not is_compressible(name, shape):
            return plain
        return StoredForm(name, shape, torch.uint8, self._codec, None)

    def chunks(self, form: StoredForm, first: int, last: int) -> Iterator[torch.Tensor]:
        if form.place is not None:
            yield from self._placed_chunks(form, form.place, first, last)
            return
        plain = self._plain_form(form.name, form.shape)
        if plain.place is not None:
            for rows in self._placed_chunks(plain, plain.place, first, last):
                yield form.codec.encode(plain.numbers(rows).float()) if form.codec else rows
            return
        yield from _chunks_of(self._checkpoint.read(form.name, form.shape), form, first, last)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        form = self.form(name, shape)
        if form.codec is None and form.place is None:
            return self._checkpoint.read(name, shape)
        numbers = torch.empty(form.num_rows, form.row_len, dtype=torch.float32 if form.codec else form.dtype)
        for rows, target in _chunks_into(numbers, self, form):
            form.unpack(rows, target)
        return numbers.view(shape)

    def read_packed(self, name: str, shape: tuple[int, ...], codec: Codec, out: torch.Tensor) -> None:
        form = self.form(name, shape)
        if form.place is not None and not self._files.direct and _is_packed_by(codec, form):
            self._files[form.place.path].read(form.place.offset, out.numpy().reshape(-1).data)
        else:
            _read_packed(self, form, codec, out)

    def _plain_form(self, name: str, shape: tuple[int, ...]) -> StoredForm:
        place = self._checkpoint.locate(name, shape)
        dtype = place.dtype if place is not None else self._checkpoint.read(name, shape).dtype
        return StoredForm(name, shape, dtype, None, place)

    def _placed_chunks(self, form: StoredForm, place: FileRange, first: int, last: int) -> Iterator[torch.Tensor]:
        step = _rows_per_chunk(form.row_bytes)
        buffer = new_buffer(min(step, max(last - first, 1)) * form.row_bytes + 2 * BLOCK_BYTES)
        file = self._files[place.path]
        for row in range(first, last, step):
            start = place.offset + row * form.row_bytes
            end = place.offset + min(row + step, last) * form.row_bytes
            base = aligned_down(start)
            file.read(base, buffer.numpy()[: aligned_up(end) - base].data)
            yield buffer[start - base : end - base].view(-1, form.row_bytes)


class DummySource:
    """Random weights, the same for the same name: to time a model whose weights are not here.

    Matrices are drawn from a normal distribution of standard deviation 0.02, norms are one and biases zero, as in a model
    before its training; numbers repeat.
    """

    def __init__(self, *, dtype: torch.dtype, codec: Codec | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(DUMMY_POOL, generator=generator) * DUMMY_STD
        self._dtype = dtype
        self._codec = codec

    def form(self, name: str, shape: tuple[int, ...]) -> StoredForm:
        if self._codec is not None and is_compressible(name, shape):
            return StoredForm(name, shape, torch.uint8, self._codec, None)
        return StoredForm(name, shape, self._dtype, None, None)

    def chunks(self, form: StoredForm, first: int, last: int) -> Iterator[torch.Tensor]:
        dtype = torch.float32 if form.codec else form.dtype
        step = min(_rows_per_chunk(form.row_len * dtype.itemsize), max(last - first, 1))
        buffer = _new_numbers(step * form.row_len, dtype)
        for row in range(first, last, step):
            count = min(step, last - row) * form.row_len
            numbers = self._fill(form, row * form.row_len, buffer[:count]).view(-1, form.row_len)
            yield form.codec.encode(numbers) if form.codec else _as_bytes(numbers)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        form = StoredForm(name, shape, self._dtype, None, None)
        return self._fill(form, 0, _new_numbers(form.num_rows * form.row_len, self._dtype)).view(shape)

    def read_packed(self, name: str, shape: tuple[int, ...], codec: Codec, out: torch.Tensor) -> None:
        _read_packed(self, self.form(name, shape), codec, out)

    def _fill(self, form: StoredForm, start: int, numbers: torch.Tensor) -> torch.Tensor:
        """With those of the tensor from number `start` on."""
        if len(form.shape) == 1:
            return numbers.fill_(0.0 if form.name.endswith("bias") else 1.0)
        place, done = zlib.crc32(form.name.encode()) + start, 0
        while done < len(numbers):
            offset = (place + done) % DUMMY_POOL
            count = min(len(numbers) - done, DUMMY_POOL - offset)
            numbers[done : done + count] = self._pool[offset : offset + count]
            done += count
        return numbers


def _new_numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Not from the allocator, which would keep what large chunks leave."""
    return new_buffer(count * dtype.itemsize)[: count * dtype.itemsize].view(dtype)


def _chunks_of(tensor: torch.Tensor, form: StoredForm, first: int, last: int) -> Iterator[torch.Tensor]:
    """Of a tensor that is in memory, or mapped into it."""
    tensor_RC = tensor.view(form.num_rows, form.row_len)
    step = _rows_per_chunk(form.row_bytes)
    for row in range(first, last, step):
        numbers = tensor_RC[row : min(row + step, last)]
        yield form.codec.encode(numbers.float()) if form.codec else _as_bytes(numbers)


def _as_bytes(numbers_RC: torch.Tensor) -> torch.Tensor:
    return numbers_RC.contiguous().view(torch.uint8)
