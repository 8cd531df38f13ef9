"""Messages on a byte stream: whatever the pieces in which they come."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncpipe.errors import WireError
from asyncpipe.transport.framing import BUFFER_BYTES, LARGE_BYTES, MAX_FRAMES, MessageReader, head

SIZES = st.one_of(
    st.integers(0, 300), st.sampled_from([LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1, BUFFER_BYTES, 3 * BUFFER_BYTES])
)
MESSAGES = st.lists(st.lists(SIZES, min_size=1, max_size=5), max_size=6)
PIECES = st.lists(st.integers(1, 2 * BUFFER_BYTES), min_size=1, max_size=20)


def message_of(number: int, sizes: Iterable[int]) -> list[bytes]:
    """Of recognizable bytes."""
    return [bytes([number, index] * (size // 2 + 1))[:size] for index, size in enumerate(sizes)]


def read(reader: MessageReader, stream: bytes, pieces: list[int]) -> list[list[bytes]]:
    """As a socket would that has so many bytes at a time, round and round, never more than there is space for, and of a long
    stream no tiny ones, which take their time."""
    messages, at, turn = [], 0, 0
    pieces = [max(piece, len(stream) // 2000) for piece in pieces]
    while at < len(stream):
        space = reader.space()
        assert space.nbytes > 0
        piece = stream[at : at + min(pieces[turn % len(pieces)], space.nbytes)]
        space[: len(piece)] = piece
        messages += [[bytes(frame) for frame in frames] for frames in reader.received(len(piece))]
        at, turn = at + len(piece), turn + 1
    return messages


def new_reader() -> MessageReader:
    return MessageReader(max_frames=8, max_frame_bytes=4 * BUFFER_BYTES)


@given(MESSAGES, PIECES)
def test_messages_are_what_was_sent_however_they_are_cut(sizes: list[list[int]], pieces: list[int]) -> None:
    sent = [message_of(number, of_one) for number, of_one in enumerate(sizes)]
    stream = b"".join(head(frames) + b"".join(frames) for frames in sent)
    assert read(new_reader(), stream, pieces) == sent


@given(st.binary(max_size=2000), PIECES)
def test_garbage_is_an_error_or_waits_for_more_and_nothing_else(garbage: bytes, pieces: list[int]) -> None:
    reader = new_reader()
    try:
        read(reader, garbage, pieces)
    except WireError:
        return
    assert reader.space().nbytes > 0


def test_frames_are_there_byte_by_byte_and_large_ones_are_not_writable() -> None:
    frames = [b"", b"x" * LARGE_BYTES, b"tail"]
    reader, stream = new_reader(), head([b"", b"x" * LARGE_BYTES, b"tail"]) + b"".join(frames)
    found = []
    for index in range(len(stream)):
        reader.space()[:1] = stream[index : index + 1]
        found += list(reader.received(1))
    (message,) = found
    assert [bytes(frame) for frame in message] == frames
    large = message[1]
    assert isinstance(large, memoryview) and large.readonly


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        (struct.pack("<I", 0), "a message of 0 frames"),
        (struct.pack("<I", 9), "a message of 9 frames"),
        (struct.pack("<I", 2**32 - 1), "a message of 4294967295 frames"),
        (b"GET / HTTP/1.1\r\n\r\n", "frames"),
        (
            struct.pack("<IQ", 1, 4 * BUFFER_BYTES + 1),
            f"a frame of {4 * BUFFER_BYTES + 1} bytes, where at most {4 * BUFFER_BYTES}",
        ),
        (struct.pack("<IQQ", 2, 1, 2**64 - 1), "a frame of 18446744073709551615 bytes"),
    ],
)
def test_limits_are_known_before_anything_is_allocated(stream: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        read(new_reader(), stream, [len(stream)])


def test_no_reader_takes_more_frames_than_its_buffer_has_room_for_the_sizes_of() -> None:
    reader = MessageReader(max_frames=10**9, max_frame_bytes=1)
    frames = [b"x"] * MAX_FRAMES
    assert read(reader, head(frames) + b"x" * MAX_FRAMES, [1000]) == [frames]
    with pytest.raises(WireError):
        read(reader, head([b"x"] * (MAX_FRAMES + 1)), [1000])
