"""The input of a batch, line by line, in bounded memory however long the file or a line is."""

from __future__ import annotations

import contextlib
import itertools
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from asyncpipe.errors import AsyncPipeError, Invalid

MAX_LINE_BYTES = 64 * 2**20

BUFFER_BYTES = 2**20
_BLANKS = b" \t\r\v\f"


class InputLine(NamedTuple):
    """A line without its newline, or why it cannot be one: exactly one of `data` and `error` is None."""

    number: int  # from 1
    data: bytes | None
    error: Invalid | None


def count_lines(path: Path) -> int:
    """How many lines `read_lines` gives: blank ones do not count. Raises Invalid when `path` cannot be read."""
    num_lines = 0
    within_line = False  # at the end of the chunk before
    with reading(path) as stream:
        while chunk := stream.read(BUFFER_BYTES):
            chunk = chunk.translate(None, _BLANKS)
            while b"\n\n" in chunk:
                chunk = chunk.replace(b"\n\n", b"\n")
            if not within_line:
                chunk = chunk.removeprefix(b"\n")
            num_lines += chunk.count(b"\n")
            if chunk:
                within_line = not chunk.endswith(b"\n")
    return num_lines + within_line


def read_lines(path: Path, start_line: int = 1, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[InputLine]:
    """The lines of `path` from number `start_line`. Blank lines are left out, but have a number.

    Raises Invalid when `path` cannot be read. A line above `max_line_bytes` is given as an error, and never held whole.
    """
    with reading(path) as stream:
        for number in itertools.count(1):
            data = stream.readline(max_line_bytes + 1)
            if not data:
                return
            too_long = len(data) > max_line_bytes and not data.endswith(b"\n")
            if too_long:
                _skip_line(stream)
            if number < start_line:
                continue
            if too_long:
                yield InputLine(number, None, Invalid(f"the line is longer than {max_line_bytes} bytes"))
            elif not data.isspace():
                yield InputLine(number, data.rstrip(b"\r\n"), None)


def _skip_line(stream: BinaryIO) -> None:
    while (rest := stream.readline(BUFFER_BYTES)) and not rest.endswith(b"\n"):
        pass


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened to be read. Raises Invalid."""
    with os_errors(f"cannot read {path}", Invalid):
        if not stat.S_ISREG(path.stat().st_mode):
            raise Invalid(f"cannot read {path}: it is not a regular file")
        with path.open("rb", buffering=BUFFER_BYTES) as stream:
            yield stream


@contextlib.contextmanager
def os_errors(what: str, error_type: type[AsyncPipeError], hint: str = "") -> Iterator[None]:
    """Make the operating system's refusals one clear line."""
    try:
        yield
    except OSError as error:
        raise error_type(f"{what}: {error.strerror or error}{hint}") from None
