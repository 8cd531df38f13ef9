"""Parts of files as memory: read without a copy, dropped and read again if memory is short, and one for all who map them."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from asyncpipe_workers.checkpoint_files import FileRange

MADV_POPULATE_READ = 22  # madvise(2), since Linux 5.14


class MappedRanges:
    """Ranges of files, of which those that are expected one after the other, and lie so, are parts of one mapping: as memory
    they have no bounds between them."""

    def __init__(self) -> None:
        self._runs: dict[FileRange, _Run] = {}

    def expect(self, places: Iterable[FileRange]) -> None:
        run: _Run | None = None
        for place in places:
            if run is None or not run.grow(place):
                run = _Run(place)
            self._runs[place] = run

    def read(self, place: FileRange) -> torch.Tensor:
        """(num_bytes,) uint8, which are in memory; what is written to them is not written to the file. A range that was
        expected, once.

        Raises OSError when it cannot be read.
        """
        run = self._runs.pop(place, None) or _Run(place)
        return run.read(place)


class _Run:
    def __init__(self, place: FileRange) -> None:
        self._path = place.path
        self._start = place.offset
        self._end = place.offset + place.num_bytes
        self._memory: torch.Tensor | None = None
        self._lock = threading.Lock()

    def grow(self, place: FileRange) -> bool:
        """To have `place` too, if it is what follows."""
        if (place.path, place.offset) != (self._path, self._end):
            return False
        self._end += place.num_bytes
        return True

    def read(self, place: FileRange) -> torch.Tensor:
        with self._lock:
            if self._memory is None:
                self._memory = _mapped(self._path, self._start, self._end)
        start = place.offset - self._start
        own = self._memory[start : start + place.num_bytes]
        _bring_in(own)
        return own


def _mapped(path: Path, start: int, end: int) -> torch.Tensor:
    """As long as a tensor has it. Where a file system maps no files, it is a copy."""
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    memory: mmap.mmap | bytearray
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < end:
            raise OSError(f"{path} is cut short")
        try:
            memory = mmap.mmap(file.fileno(), max(end - first, 1), flags=mmap.MAP_PRIVATE, prot=protection, offset=first)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            memory = bytearray(max(end - first, 1))
            file.seek(first)
            file.readinto(memory)
    return torch.frombuffer(memory, dtype=torch.uint8)[start - first :]


def _bring_in(memory: torch.Tensor) -> None:
    """All of it at once, which is several times as quick as page by page. Raises OSError."""
    start = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    if _madvise()(start, memory.data_ptr() + len(memory) - start, MADV_POPULATE_READ) == 0:
        return
    error = ctypes.get_errno()
    if error == errno.EINVAL:  # an older kernel
        memory[:: mmap.PAGESIZE].sum()
        return
    raise OSError(error, "reading it failed" if error == errno.EFAULT else os.strerror(error))


@functools.cache
def _madvise() -> Any:
    """Python's own keeps all other threads waiting."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, use_errno=True)
    return prototype(("madvise", ctypes.CDLL(None)))
