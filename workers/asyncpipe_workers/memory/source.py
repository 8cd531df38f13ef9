"""A model's tensors in the form in which they are stored, by rows, so that no more is in memory than is wanted."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from asyncpipe.policy import is_compressible
from asyncpipe.tensor_names import quantized_suffix
from asyncpipe_workers.checkpoint import Checkpoint, FileRange
from asyncpipe_workers.memory.disk import BLOCK_BYTES, DiskFiles, aligned_down, aligned_up, new_buffer
from asyncpipe_workers.memory.mapped import MappedRanges
from asyncpipe_workers.memory.quantization import Codec, make_codec
from asyncpipe_workers.memory.read_ahead import ReadAhead
from asyncpipe_workers.memory.stored_form import StoredForm

CHUNK_BYTES = 16 << 20  # of rows read, or packed, at once
DUMMY_STD = 0.02
DUMMY_POOL = 1 << 20


class TensorSource(Protocol):
    """Names and shapes are those that the model's code uses."""

    def form(self, name: str, shape: tuple[int, ...], codec: Codec | None = None) -> StoredForm:
        """In which it is read; with `codec`, in which it is read to be packed by that. Raises Invalid for a tensor that is not
        there, or has another shape."""
        ...

    def chunks(self, form: StoredForm, first: int, last: int) -> Iterator[torch.Tensor]:
        """Rows [first, last) as bytes, some at a time: (n, row_bytes) uint8, valid until the next."""
        ...

    def expect(self, forms: Iterable[StoredForm]) -> None:
        """That `read` and `read_packed` will be asked for these, in this order."""
        ...

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """All of it, as numbers; nobody else has them."""
        ...

    def has_packed(self, name: str, shape: tuple[int, ...], codec: Codec) -> bool:
        """Whether it is stored in the codec's form, if in others too."""
        ...

    def read_packed(self, name: str, shape: tuple[int, ...], codec: Codec) -> torch.Tensor:
        """All rows in the codec's form, (n, packed bytes) uint8; nobody else has them."""
        ...


def _packed(source: TensorSource, form: StoredForm, codec: Codec) -> torch.Tensor:
    """Rows that are not in the codec's form, packed some at a time."""
    packed = torch.empty(form.num_rows, codec.packed_size(form.row_len), dtype=torch.uint8)
    for rows, target in _chunks_into(packed, source, form):
        numbers = torch.empty(len(rows), form.row_len, dtype=torch.float32 if form.codec else form.dtype)
        form.unpack(rows, numbers)
        target.copy_(codec.encode(numbers))
    return packed


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
        self._mapped = MappedRanges()
        self._ahead = ReadAhead(self._read_rows)

    def form(self, name: str, shape: tuple[int, ...], codec: Codec | None = None) -> StoredForm:
        is_wanted = name not in self._names or (codec is not None and codec == self._packed_codec)
        if is_wanted and self._packed_codec is not None and name + self._suffix in self._names:
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

    def expect(self, forms: Iterable[StoredForm]) -> None:
        placed = [form for form in forms if form.place is not None]
        self._mapped.expect(form.place for form in placed if form.place is not None)
        self._ahead.expect(placed)

    def close(self) -> None:
        self._ahead.close()

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        form = self.form(name, shape)
        if form.codec is None and form.place is None:
            return self._checkpoint.read(name, shape).clone()  # so that the mapped file can be let go
        return form.all_numbers(self._rows(form))

    def has_packed(self, name: str, shape: tuple[int, ...], codec: Codec) -> bool:
        form = self.form(name, shape, codec)
        return form.place is not None and _is_packed_by(codec, form)

    def read_packed(self, name: str, shape: tuple[int, ...], codec: Codec) -> torch.Tensor:
        form = self.form(name, shape, codec)
        return self._rows(form) if _is_packed_by(codec, form) else _packed(self, form, codec)

    def _rows(self, form: StoredForm) -> torch.Tensor:
        rows = self._ahead.take(form)
        return self._read_rows(form) if rows is None else rows

    def _read_rows(self, form: StoredForm) -> torch.Tensor:
        if form.place is not None and not self._files.direct:
            return self._mapped.read(form.place).view(form.num_rows, form.row_bytes)
        rows = torch.empty(form.num_rows, form.row_bytes, dtype=torch.uint8)
        for chunk, target in _chunks_into(rows, self, form):
            target.copy_(chunk)
        return rows

    def _plain_form(self, name: str, shape: tuple[int, ...]) -> StoredForm:
        place = self._checkpoint.locate(name, shape)
        dtype = place.dtype if place is not None else self._checkpoint.read(name, shape).dtype
        return StoredForm(name, shape, dtype, None, place)

    def _placed_chunks(self, form: StoredForm, place: FileRange, first: int, last: int) -> Iterator[torch.Tensor]:
        step = _rows_per_chunk(form.row_bytes)
        if not self._files.direct:
            yield from torch.split(self._rows(form)[first:last], step)
            return
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

    def form(self, name: str, shape: tuple[int, ...], codec: Codec | None = None) -> StoredForm:
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

    def expect(self, forms: Iterable[StoredForm]) -> None:
        """Nothing is read."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        form = StoredForm(name, shape, self._dtype, None, None)
        return self._fill(form, 0, _new_numbers(form.num_rows * form.row_len, self._dtype)).view(shape)

    def has_packed(self, name: str, shape: tuple[int, ...], codec: Codec) -> bool:
        return False

    def read_packed(self, name: str, shape: tuple[int, ...], codec: Codec) -> torch.Tensor:
        return _packed(self, self.form(name, shape), codec)

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
