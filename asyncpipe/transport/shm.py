"""Large frames through memory that two processes on one host both map: one copy instead of four, and no socket in between.

Nothing here has a name in a file system, so nothing can be left behind, not even by SIGKILL: memory comes from
`memfd_create`, and the peer opens it as `/proc/PID/fd/FD`, which only works for processes of the same user, kernel and PID
namespace. How two peers get there (the messages are in `credit.Kind`):

1. Each Hello carries `pid:fd:nonce`, where the memory behind `fd` begins with `nonce`. A peer that can read it answers
   SHARED. Each direction is agreed on by itself; without SHARED, or anywhere but on Linux, frames go inline as always.
2. A sender's arena starts empty and grows by segments: SEGMENT names a new one, MAPPED says that the peer has mapped it.
   Only then it is used, so that a message never names memory that its receiver may fail to open, or that dies before.
3. A large frame is copied into a free region of a segment, and the message carries (region, segment, offset, size) instead.
   The receiver hands out a read-only view. When nothing refers to it any more, RELEASE gives the region back.

Segments are sealed against resizing, and receivers check that: touching a shrunk one would be a SIGBUS.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import functools
import mmap
import os
import re
import secrets
import struct
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from asyncpipe.errors import AsyncPipeError, WireError
from asyncpipe.transport.credit import nbytes_of
from asyncpipe.wire.tensors import Buffer

if sys.platform == "linux":
    import fcntl

THRESHOLD_BYTES = 256 * 1024  # smaller frames are as fast inline
SEGMENT_BYTES = 64 * 1024 * 1024
MAX_ARENA_BYTES = 512 * 1024 * 1024  # of one direction of one link
PAGE_BYTES = 4096
MEMFD_NAME = "asyncpipe"
PROOF_PATTERN = re.compile(r"([0-9]{1,9}):([0-9]{1,9}):([0-9a-f]{32})")
ENTRY = struct.Struct("<HIIQQ")  # position of the frame in the message, region, segment, offset, size


class Entry(NamedTuple):
    """Where one frame of a message lies."""

    position: int
    region: int
    segment: int
    offset: int
    size: int


class Placed(NamedTuple):
    """A message of which some frames lie in shared memory."""

    table: bytes
    inline: list[Buffer]
    entries: list[Entry]


# --- the proof that two processes share a kernel ----------------------------------------------------------------------


def proof() -> str:
    """What this process puts into `Hello.shm`; "" where there is no such memory."""
    return _proof_of(os.getpid())


@functools.cache
def _proof_of(pid: int) -> str:
    """Keyed by process: a forked child proves itself."""
    nonce = secrets.token_hex(16)
    try:
        fd = _create_memfd(PAGE_BYTES, content=nonce.encode())
    except (OSError, AttributeError):  # no memfd_create, or no descriptors left
        return ""
    return f"{pid}:{fd}:{nonce}"


def verified_pid(text: str) -> int | None:
    """The process that wrote this proof, when its memory can be read from here."""
    match = PROOF_PATTERN.fullmatch(text)
    if match is None or sys.platform != "linux":
        return None
    pid, nonce = int(match[1]), match[3].encode()
    try:
        fd = _open_memfd(pid, int(match[2]))
    except OSError:
        return None
    try:
        return pid if os.pread(fd, len(nonce), 0) == nonce else None
    finally:
        os.close(fd)


def _create_memfd(size: int, *, content: bytes = b"") -> int:
    fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, content, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_memfd(pid: int, fd: int) -> int:
    """Raises OSError unless it is one of ours, sealed. The name is looked at first: opening a stranger's pipe may block."""
    path = f"/proc/{pid}/fd/{fd}"
    if not os.readlink(path).startswith(f"/memfd:{MEMFD_NAME}"):
        raise OSError(f"{path} is not shared memory of asyncpipe")
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    needed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        if fcntl.fcntl(opened, fcntl.F_GET_SEALS) & needed != needed:
            raise OSError(f"{path} may change its size")
    except BaseException:
        os.close(opened)
        raise
    return opened


# --- sending ----------------------------------------------------------------------------------------------------------


class FreeList:
    """Free ranges of [0, size), lowest first: pages used before are in the cache, fresh ones cost a page fault each."""

    def __init__(self, size: int) -> None:
        self._holes = [(0, size)]  # (offset, size), by offset, never adjacent

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes that are now taken."""
        for index, (offset, hole_size) in enumerate(self._holes):
            if hole_size >= size:
                self._holes[index : index + 1] = [(offset + size, hole_size - size)] if hole_size > size else []
                return offset
        return None

    def give(self, offset: int, size: int) -> None:
        """Back to the free ranges, joined with its neighbours."""
        index = bisect.bisect(self._holes, (offset, 0))
        end = offset + size
        if index < len(self._holes) and self._holes[index][0] == end:
            end += self._holes.pop(index)[1]
        if index > 0 and sum(self._holes[index - 1]) == offset:
            index -= 1
            offset = self._holes.pop(index)[0]
        self._holes.insert(index, (offset, end - offset))


class Segment:
    """One piece of the sender's memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = _create_memfd(size)  # until the peer has mapped it
        try:
            self.bytes = np.frombuffer(mmap.mmap(self.fd, size), dtype=np.uint8)
        except BaseException:
            os.close(self.fd)
            raise
        self.free = FreeList(size)

    def close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Arena:
    """The sender's side: where its large frames lie until the peer has let go of them.

    `announce(fd)` sends SEGMENT; it may raise Busy or Broken.
    """

    def __init__(self, announce: Callable[[int], None]) -> None:
        self._announce = announce
        self._segments: list[Segment] = []
        self._unmapped: Segment | None = None
        self._regions: dict[int, Entry] = {}
        self._next_region = 0
        self._may_grow = True

    def place(self, frames: Sequence[Buffer]) -> Placed | None:
        """Copy the large ones of `frames` into free regions; None when there is none, large frame or free region."""
        entries: list[Entry] = []
        inline: list[Buffer] = []
        for position, frame in enumerate(frames):
            if nbytes_of(frame) >= THRESHOLD_BYTES and (entry := self._store(position, frame)) is not None:
                entries.append(entry)
            else:
                inline.append(frame)
        if not entries:
            return None
        return Placed(b"".join(ENTRY.pack(*entry) for entry in entries), inline, entries)

    def free(self, region: int) -> None:
        """Raises WireError for a region that the peer does not have."""
        entry = self._regions.pop(region, None)
        if entry is None:
            raise WireError(f"region {region} was released but not in use")
        self._segments[entry.segment].free.give(entry.offset, _round_up(entry.size))

    def on_mapped(self, succeeded: bool) -> None:
        """The peer's answer to the last announcement. Raises WireError when there was none."""
        if self._unmapped is None:
            raise WireError("a segment was mapped that was not announced")
        segment, self._unmapped = self._unmapped, None
        segment.close_fd()
        if succeeded:
            self._segments.append(segment)
        self._may_grow = succeeded

    def close(self) -> None:
        if self._unmapped is not None:
            self._unmapped.close_fd()
        self._unmapped = None
        self._segments.clear()
        self._regions.clear()
        self._may_grow = False

    def _store(self, position: int, frame: Buffer) -> Entry | None:
        size = nbytes_of(frame)
        for index, segment in enumerate(self._segments):
            offset = segment.free.take(_round_up(size))
            if offset is not None:
                np.copyto(segment.bytes[offset : offset + size], np.frombuffer(frame, dtype=np.uint8))
                return self._register(position, index, offset, size)
        self._grow(size)
        return None  # inline this time; the new segment is there for the next frame

    def _register(self, position: int, segment: int, offset: int, size: int) -> Entry:
        self._next_region = (self._next_region + 1) % 2**32
        entry = self._regions[self._next_region] = Entry(position, self._next_region, segment, offset, size)
        return entry

    def _grow(self, size: int) -> None:
        wanted = max(SEGMENT_BYTES, _round_up(size))
        held = sum(segment.size for segment in self._segments)
        if self._unmapped is not None or not self._may_grow or held + wanted > MAX_ARENA_BYTES:
            return
        with contextlib.suppress(OSError, AsyncPipeError):  # then not now
            segment = Segment(wanted)
            try:
                self._announce(segment.fd)
            except BaseException:
                segment.close_fd()
                raise
            self._unmapped = segment


def _round_up(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


# --- receiving --------------------------------------------------------------------------------------------------------


class PeerMemory:
    """The receiver's side: the peer's segments, mapped read-only. `release(region)` is called from the loop."""

    def __init__(self, pid: int, release: Callable[[int], None], *, max_frames: int) -> None:
        self._pid = pid
        self._max_frames = max_frames
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._segments: list[mmap.mmap] = []
        self._unused: deque[int] = deque()
        self._is_open = True

    def map(self, fd: int) -> bool:
        """Map the peer's segment; False when that cannot be done."""
        try:
            opened = _open_memfd(self._pid, fd)
        except OSError:
            return False
        try:
            size = os.fstat(opened).st_size
            if sum(map(len, self._segments)) + size > MAX_ARENA_BYTES:
                return False
            self._segments.append(mmap.mmap(opened, size, prot=mmap.PROT_READ))
        except (OSError, ValueError):
            return False
        finally:
            os.close(opened)
        return True

    def frames(self, received: Sequence[Buffer]) -> list[Buffer]:
        """The message of which `received` is the table and the inline frames. Raises WireError."""
        num_bytes = nbytes_of(received[0]) if received else 0
        if num_bytes % ENTRY.size or not 0 < num_bytes <= self._max_frames * ENTRY.size:
            raise WireError("a message in shared memory needs a table of its regions")
        frames = list(received[1:])
        for entry in map(Entry._make, ENTRY.iter_unpack(received[0])):
            if entry.position > len(frames):
                raise WireError(f"frame {entry.position} of a message is missing")
            frames.insert(entry.position, self._view(entry))
        return frames

    def close(self) -> None:
        """Let go of the segments; views that are still in use keep theirs."""
        self._is_open = False
        self._segments.clear()

    def _view(self, entry: Entry) -> memoryview:
        if entry.segment >= len(self._segments):
            raise WireError(f"segment {entry.segment} of shared memory was never announced")
        segment = self._segments[entry.segment]
        if not 0 < entry.size <= len(segment) - entry.offset:
            raise WireError(f"{entry.size} bytes at {entry.offset} are not in a segment of {len(segment)} bytes")
        # Everything made from a view of this array, by numpy, torch or slicing, keeps the array alive: its end is the last.
        array = np.frombuffer(segment, dtype=np.uint8, count=entry.size, offset=entry.offset)
        weakref.finalize(array, self._on_unused, entry.region).atexit = False
        return array.data

    def _on_unused(self, region: int) -> None:
        """In whichever thread dropped the last reference."""
        self._unused.append(region)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the link with it
            self._loop.call_soon_threadsafe(self._release_unused)

    def _release_unused(self) -> None:
        while self._unused and self._is_open:
            self._release(self._unused.popleft())
