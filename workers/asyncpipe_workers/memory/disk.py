"""Files on the disk tier: reads that go past the page cache where the file system lets them, and files that leave no trace.

Direct reads (O_DIRECT, open(2)) want memory, file offset and length in multiples of a block. So a range is read from the block
in which it begins to the block in which it ends, and is found in the buffer at its offset within the first block.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from pathlib import Path
from typing import Self

import torch

from asyncpipe.errors import Invalid

HOST = torch.device("cpu")
BLOCK_BYTES = 4096
CHUNK_BYTES = 4 << 20  # of one read: large enough for any disk's rate, small enough to share among threads


def aligned_down(value: int) -> int:
    return value // BLOCK_BYTES * BLOCK_BYTES


def aligned_up(value: int) -> int:
    return -(-value // BLOCK_BYTES) * BLOCK_BYTES


def new_buffer(num_bytes: int, device: torch.device = HOST) -> torch.Tensor:
    """At least so many bytes. In CPU memory they begin on a page, and the operating system gives pages as they are touched."""
    num_bytes = max(aligned_up(num_bytes), BLOCK_BYTES)
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


class DiskFile:
    """A file to read ranges of, by any number of threads at once; `direct` past the page cache, for what is read often and
    would only push out what else is there. Raises Invalid when it cannot be opened."""

    def __init__(self, path: Path | str, *, name: str | None = None, direct: bool = True) -> None:
        self.name = name or str(path)
        self._is_closed = False
        self._stays_cached = not direct
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Invalid(f"cannot read {self.name}: {error.strerror}") from None
        self._direct_fd: int | None = None
        if direct:
            with contextlib.suppress(OSError):  # of a file system without direct reads
                self._direct_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))

    def read(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the file's bytes from `offset` on; both in whole blocks, but for the file's end.

        Raises Invalid for a file that is cut short or cannot be read.
        """
        done = 0
        while done < len(target):
            count = self._read_some(offset + done, target[done:])
            if not count:
                if done + BLOCK_BYTES > len(target):
                    return  # the file ends within the last block
                raise Invalid(f"{self.name} is cut short: it has no byte {offset + done}")
            done += count

    def _read_some(self, offset: int, target: memoryview) -> int:
        try:
            if self._direct_fd is not None and offset % BLOCK_BYTES == 0:
                try:
                    return os.preadv(self._direct_fd, [target], offset)
                except OSError:
                    self._direct_fd = None  # opened, but not able to
            count = os.preadv(self._fd, [target], offset)
        except OSError as error:
            raise Invalid(f"cannot read {self.name}: {error.strerror}") from None
        if not self._stays_cached:
            self.forget(offset, count)
        return count

    def forget(self, offset: int, num_bytes: int) -> None:
        """Let the page cache drop what nobody will ask for soon."""
        self._advise(offset, num_bytes, "POSIX_FADV_DONTNEED")

    def _advise(self, offset: int, num_bytes: int, advice: str) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, offset, num_bytes, getattr(os, advice))

    def close(self) -> None:
        """May be called again."""
        for descriptor in (self._fd, self._direct_fd):
            if descriptor is not None and not self._is_closed:
                os.close(descriptor)
        self._is_closed = True


class DiskFiles:
    """The files that are read, opened once; `direct` as of `DiskFile`, whose other reads need no alignment. Use in `with`, or
    `close`."""

    def __init__(self, *, direct: bool = True) -> None:
        self.direct = direct
        self._files: dict[str, DiskFile] = {}
        self._lock = threading.Lock()

    def __getitem__(self, path: Path | str) -> DiskFile:
        with self._lock:
            if str(path) not in self._files:
                self._files[str(path)] = DiskFile(path, direct=self.direct)
            return self._files[str(path)]

    def add(self, key: str, file: DiskFile) -> None:
        self._files[key] = file

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ScratchFile:
    """A file of this run without a name: it is gone when the process is, however that ends.

    Raises Invalid when it cannot be made, or there is no room for `num_bytes`, all of which are set aside at once.
    """

    def __init__(self, directory: Path, num_bytes: int, *, what: str) -> None:
        self.name = f"{what} in {directory}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._fd = _open_nameless(directory)
        except OSError as error:
            raise Invalid(f"--offload-dir {directory}: no file can be made there: {error.strerror}") from None
        try:
            if num_bytes:
                os.posix_fallocate(self._fd, 0, num_bytes)
        except OSError as error:
            os.close(self._fd)
            raise Invalid(f"--offload-dir {directory}: no room for {num_bytes} bytes of {what}: {error.strerror}") from None
        self.reader = DiskFile(f"/proc/self/fd/{self._fd}", name=self.name)

    def write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)

    def flush(self) -> None:
        """Onto the disk, so that direct reads find it and the page cache can let go of it."""
        os.fdatasync(self._fd)
        self.reader.forget(0, 0)

    def read(self, offset: int, target: memoryview) -> None:
        """Any range that was written."""
        done = 0
        while done < len(target):
            done += os.preadv(self._fd, [target[done:]], offset + done)
        self.reader.forget(offset, len(target))

    def close(self) -> None:
        self.reader.close()
        os.close(self._fd)


def _open_nameless(directory: Path) -> int:
    with contextlib.suppress(OSError, AttributeError):  # a file system, or a system, without O_TMPFILE
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    path = directory / f"asyncpipe-{os.getpid()}-{os.urandom(8).hex()}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    path.unlink()
    return descriptor
