"""Files that hold tensors: safetensors and `.bin`, and where in a file a tensor's bytes are.

The safetensors format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
Source: the safetensors repository, "Format".
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch

from asyncpipe.errors import Invalid

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
AGAIN = "download or save it again"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FileRange(NamedTuple):
    """A tensor's bytes within a file: little-endian, row after row. They are there when the range is given out."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile(Protocol):
    def names(self) -> Collection[str]: ...

    def locate(self, name: str) -> FileRange | None:
        """None where its bytes do not lie in one piece. Raises KeyError for a name that is not there, and Invalid."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Raises like `locate`."""
        ...


def open_tensor_file(path: Path) -> TensorFile:
    """Raises Invalid for a file that is missing, unreadable, cut short or damaged."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else BinFile(path)


class SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries, self._data_start, self._num_data_bytes = _read_header(path)

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def locate(self, name: str) -> FileRange:
        entry = self._entries[name]
        try:
            begin, end = map(int, entry["data_offsets"])
            shape, dtype = tuple(map(int, entry["shape"])), str(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            raise Invalid(f"{self._path} is damaged: its header does not describe {name}; {AGAIN}") from None
        if dtype not in DTYPES:
            raise Invalid(f"{self._path}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        found = FileRange(self._path, self._data_start + begin, end - begin, DTYPES[dtype], shape)
        if min(shape, default=0) < 0 or found.num_bytes != math.prod(shape) * found.dtype.itemsize:
            raise Invalid(f"{self._path} is damaged: tensor {name} has {end - begin} bytes, which is not its shape; {AGAIN}")
        if begin < 0 or end > self._num_data_bytes:
            raise Invalid(f"{self._path} is damaged: tensor {name} is not within its data; {AGAIN}")
        return found

    def read(self, name: str) -> torch.Tensor:
        return read_range(self.locate(name))


class BinFile:
    """A `.bin` file, mapped into memory; `weights_only` keeps code out of it."""

    def __init__(self, path: Path) -> None:
        with reading(path):
            pass  # for a clear line about a file that cannot be opened
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self._tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        except Exception as error:  # torch.load raises whatever its unpickler met
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise Invalid(f"{path} is not a checkpoint that can be read safely: {first_line}") from None

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def locate(self, name: str) -> None:
        """A tensor may be a view of another's bytes, or of a compressed file's."""
        if name not in self._tensors:
            raise KeyError(name)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def read_range(where: FileRange) -> torch.Tensor:
    """The tensor, mapped: bytes are read as they are used, and writing to them changes no file. Raises Invalid."""
    if not where.num_bytes:
        return torch.empty(where.shape, dtype=where.dtype)
    within_page = where.offset % mmap.ALLOCATIONGRANULARITY
    with reading(where.path) as stream:
        try:
            pages = mmap.mmap(
                stream.fileno(),
                within_page + where.num_bytes,
                access=mmap.ACCESS_COPY,
                offset=where.offset - within_page,
            )
        except ValueError:
            raise Invalid(f"{where.path} is cut short since it was opened; {AGAIN}") from None
    buffer: mmap.mmap | bytearray = pages
    if where.offset % where.dtype.itemsize:  # files do not promise that tensors begin where their items could
        buffer, within_page = bytearray(pages[within_page:]), 0
    count = math.prod(where.shape)
    return torch.frombuffer(buffer, dtype=where.dtype, count=count, offset=within_page).view(where.shape)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened to be read. Raises Invalid."""
    try:
        with path.open("rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise Invalid(f"cannot read {path}: it is not a regular file")
            yield stream
    except OSError as error:
        raise Invalid(f"cannot read {path}: {error.strerror or error}") from None


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int, int]:
    """Entries by name, where the data begins, and how many bytes it has: as many as the entries say."""
    with reading(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        header_len = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if header_len > min(MAX_HEADER_BYTES, size - 8):
            raise Invalid(f"{path} is not a whole safetensors file (its header is cut short); {AGAIN}")
        header = stream.read(header_len)
    num_data_bytes = size - 8 - header_len
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        num_described = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError):
        raise Invalid(f"{path} is damaged: its header does not describe tensors; {AGAIN}") from None
    if num_described != num_data_bytes:
        what = "cut short" if num_data_bytes < num_described else "longer than its header says"
        raise Invalid(
            f"{path} is {what}: it holds {num_data_bytes} bytes of data, its header describes {num_described}; {AGAIN}"
        )
    return entries, 8 + header_len, num_data_bytes
