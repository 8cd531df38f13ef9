"""Multipart messages on a byte stream.

A message is its number of frames (u32), the size of each in bytes (u64), and the frames; all little-endian.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from asyncpipe.errors import WireError
from asyncpipe.transport.credit import nbytes_of
from asyncpipe.wire.tensors import Buffer

COUNT = struct.Struct("<I")
MAX_FRAMES = 4096  # of any message; what its reader allows is far less
LARGE_BYTES = 65_536  # frames of so many bytes are received where they stay; smaller ones are copied out of what has come
BUFFER_BYTES = 4 * LARGE_BYTES


def head(frames: Sequence[Buffer]) -> bytes:
    """What goes before `frames`."""
    return _struct_of(len(frames)).pack(len(frames), *map(nbytes_of, frames))


@functools.cache
def _struct_of(num_frames: int) -> struct.Struct:
    return struct.Struct(f"<I{num_frames}Q")


class MessageReader:
    """From bytes as they come to messages. Receive into `space()`, say how much with `received`, and take the messages.

    `max_frames` and `max_frame_bytes` bound every message; they may be changed between two.
    """

    def __init__(self, *, max_frames: int, max_frame_bytes: int) -> None:
        self.max_frames = max_frames
        self.max_frame_bytes = max_frame_bytes
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._begin = self._end = 0  # what has come and is not taken
        self._sizes: tuple[int, ...] = ()  # of the frames of the message at hand
        self._frames: list[Buffer] = []
        self._large: memoryview | None = None  # the frame that is being received
        self._num_filled = 0  # bytes of it

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._buffer[self._end :] if self._large is None else self._large[self._num_filled :]

    def received(self, num_bytes: int) -> Iterator[list[Buffer]]:
        """The messages that are complete with the `num_bytes` that `space()` has got. Raises WireError."""
        if self._large is None:
            self._end += num_bytes
        else:
            self._num_filled += num_bytes
        while self._take_frame():
            if len(self._frames) == len(self._sizes):
                frames, self._frames, self._sizes = self._frames, [], ()
                yield frames
        self._make_room()

    def _take_frame(self) -> bool:
        """Another frame is there, or the sizes of those that come."""
        if not self._sizes:
            return self._take_sizes()
        size = self._sizes[len(self._frames)]
        if size >= LARGE_BYTES:
            return self._take_large(size)
        if self._end - self._begin < size:
            return False
        self._frames.append(bytes(self._take(size)))
        return True

    def _take_sizes(self) -> bool:
        if self._end - self._begin < COUNT.size:
            return False
        (num_frames,) = COUNT.unpack_from(self._buffer, self._begin)
        if not 0 < num_frames <= min(self.max_frames, MAX_FRAMES):
            raise WireError(f"a message of {num_frames} frames")
        form = _struct_of(num_frames)
        if self._end - self._begin < form.size:
            return False
        self._sizes = form.unpack(self._take(form.size))[1:]
        if (largest := max(self._sizes)) > self.max_frame_bytes:
            raise WireError(f"a frame of {largest} bytes, where at most {self.max_frame_bytes} are taken")
        return True

    def _take_large(self, size: int) -> bool:
        if self._large is None:
            self._large = np.empty(size, dtype=np.uint8).data
            here = self._take(min(size, self._end - self._begin))
            self._large[: len(here)] = here
            self._num_filled = len(here)
        if self._num_filled < size:
            return False
        self._frames.append(self._large.toreadonly())
        self._large = None
        return True

    def _take(self, size: int) -> memoryview:
        self._begin += size
        return self._buffer[self._begin - size : self._begin]

    def _make_room(self) -> None:
        """What waits for the rest of its frame is less than a large one, or the sizes of one message."""
        if self._begin == self._end:
            self._begin = self._end = 0
        elif BUFFER_BYTES - self._end < 2 * LARGE_BYTES:
            rest = bytes(self._buffer[self._begin : self._end])
            self._buffer[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
