"""The bytes of a converted checkpoint: safetensors written by hand, tensor by tensor, with a checksum that is made on the way.

The header is padded with spaces, which the format allows, so that the data begins at a multiple of what direct reads need.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.checkpoint_files import DTYPE_NAMES
from asyncpipe_workers.manifest import ManifestFile, new_checksum

DATA_ALIGNMENT = 4096
CHUNK_BYTES = 64 << 20  # of a tensor as float32: what is held of one while it is converted


def make_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a safetensors file with these tensors, in this order, begins with: a multiple of DATA_ALIGNMENT bytes."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    padded_len = -(-(len(text) + 8) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    return struct.pack("<Q", padded_len) + text.ljust(padded_len)


class HashedFile:
    """A new file. Use in `with`; when that ends well, the file is on the disk and `entry` says what it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checksum = new_checksum()
        self._num_bytes = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        self._checksum.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self._num_bytes += len(data)

    @property
    def entry(self) -> ManifestFile:
        return ManifestFile(self._path.name, self._num_bytes, self._checksum.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)


def write_file(path: Path, data: bytes) -> ManifestFile:
    """All at once."""
    with HashedFile(path) as file:
        file.write(data)
    return file.entry


def sync_directory(path: Path) -> None:
    """So that names that were made in it, or renamed, stay when the machine stops."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def convert_in_chunks(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of `change(rows)` for some rows (R, N) of the tensor after the other; a vector is one row."""
    if not tensor.numel():
        return
    row_len = tensor.shape[-1] if tensor.ndim >= 2 else tensor.numel()
    for rows_RN in torch.split(tensor.reshape(-1, row_len), max(CHUNK_BYTES // (4 * row_len), 1)):
        yield change(rows_RN).contiguous().reshape(-1).view(torch.uint8).numpy().data


def cast(rows_RN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Raises Invalid when a number is beyond the range of `dtype`."""
    converted = rows_RN.to(dtype)
    if dtype == torch.float16 != rows_RN.dtype and not torch.equal(converted.isfinite(), rows_RN.isfinite()):
        raise Invalid("it has numbers beyond the range of float16; use --dtype bfloat16 or float32")
    return converted
