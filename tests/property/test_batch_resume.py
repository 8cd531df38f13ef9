"""Wherever a batch is cut off, running it again leaves every line exactly once; no input line can do more than be refused."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncpipe.errors import Invalid
from asyncpipe.wire.sampling import Sampling
from asyncpipe_coordinator.batch_files import ResultWriter
from asyncpipe_coordinator.batch_input import count_lines, read_lines
from asyncpipe_coordinator.batch_lines import LineFormat, find_custom_id, parse_line
from asyncpipe_coordinator.batch_order import Reorder

BATCH_SETTINGS = settings(deadline=None, derandomize=True)
MOMENTS = st.integers(0, 10_000)  # in ten-thousandths of what a run writes


class Item(NamedTuple):
    """What becomes of a line."""

    text: str
    is_error: bool


ITEMS = st.lists(st.builds(Item, text=st.text(max_size=20), is_error=st.booleans()), min_size=1, max_size=12)


class Batch:
    """An input with a line for each of `items`, and its output, in a directory of its own."""

    def __init__(self, directory: Path, items: list[Item]) -> None:
        self.items = items
        self.input = directory / "in.jsonl"
        self.output = directory / "out.jsonl"
        self.errors = directory / "out.jsonl.errors.jsonl"
        self.input.write_bytes(b"{}\n" * len(items))

    def run(self, order: list[int]) -> list[tuple[Path, bytes]]:
        """Write what is not done yet, in this order; returns what was appended to which file."""
        with ResultWriter(self.output, input_path=self.input, fingerprint="f") as writer:
            appended = [self._write(writer, line) for line in order if not writer.is_done(line)]
            assert writer.num_done == len(self.items)
            assert writer.num_errors == sum(item.is_error for item in self.items)
        return appended

    def _write(self, writer: ResultWriter, line: int) -> tuple[Path, bytes]:
        item = self.items[line - 1]
        path = self.errors if item.is_error else self.output
        before = path.stat().st_size if path.exists() else 0
        if item.is_error:
            writer.write_error(line, None, Invalid(item.text))
        else:
            writer.write_result(line, {"text": item.text})
        return path, path.read_bytes()[before:]

    def rewind(self, appended: list[tuple[Path, bytes]], num_bytes: int) -> None:
        """The files as they are when the process dies after so many bytes."""
        self.output.write_bytes(b"")
        self.errors.unlink(missing_ok=True)
        for path, data in appended:
            if num_bytes <= 0:
                break
            with path.open("ab") as stream:
                stream.write(data[:num_bytes])
            num_bytes -= len(data)

    def check(self) -> None:
        """Every line is there exactly once, in the right file, with its own content."""
        results = [json.loads(line) for line in self.output.read_bytes().splitlines()]
        errors = [json.loads(line) for line in self.errors.read_bytes().splitlines()] if self.errors.exists() else []
        found = [(record["line"], Item(record["text"], is_error=False)) for record in results]
        found += [(record["line"], Item(record["error"]["message"], is_error=True)) for record in errors]
        assert sorted(found) == list(enumerate(self.items, 1))


def test_a_batch_cut_off_at_any_byte_is_finished() -> None:
    items = [Item("é" * (index % 3), is_error=index % 3 == 1) for index in range(6)]
    with tempfile.TemporaryDirectory() as directory:
        batch = Batch(Path(directory), items)
        order = [2, 1, 4, 3, 6, 5]
        appended = batch.run(order)
        for num_bytes in range(sum(len(data) for _, data in appended) + 1):
            batch.rewind(appended, num_bytes)
            batch.run(order)
            batch.check()


@settings(BATCH_SETTINGS, max_examples=50)  # each run waits for the disk
@given(items=ITEMS, moments=st.lists(MOMENTS, max_size=4), data=st.data())
def test_a_batch_cut_off_again_and_again_in_any_order_is_finished(
    items: list[Item], moments: list[int], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        batch = Batch(Path(directory), items)
        written: list[tuple[Path, bytes]] = []
        for moment in [*moments, None]:
            written += batch.run(data.draw(st.permutations(range(1, len(items) + 1))))
            batch.check()
            if moment is not None:
                num_bytes = sum(len(record) for _, record in written) * moment // 10_000
                batch.rewind(written, num_bytes)
                written = whole_records(written, num_bytes)


def whole_records(written: list[tuple[Path, bytes]], num_bytes: int) -> list[tuple[Path, bytes]]:
    """Those that a process which dies after `num_bytes` has written to their end."""
    whole = []
    for path, record in written:
        num_bytes -= len(record)
        if num_bytes < 0:
            break
        whole.append((path, record))
    return whole


@BATCH_SETTINGS
@given(content=st.text("x{} \t\r\v\f\n", max_size=60), max_line_bytes=st.integers(1, 5), start_line=st.integers(1, 8))
def test_lines_are_counted_and_read_as_python_would(content: str, max_line_bytes: int, start_line: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "in.jsonl"
        path.write_bytes(content.encode())
        whole = [(number, line) for number, line in enumerate(content.encode().split(b"\n"), 1) if line.strip()]
        assert [(line.number, line.data) for line in read_lines(path)] == [
            (number, line.rstrip(b"\r")) for number, line in whole
        ]
        assert count_lines(path) == len(whole)
        for line in read_lines(path, start_line, max_line_bytes=max_line_bytes):
            raw = content.encode().split(b"\n")[line.number - 1]
            assert line.number >= start_line
            assert line.data == (raw.rstrip(b"\r") if len(raw) <= max_line_bytes else None)
        bounded = {line.number for line in read_lines(path, start_line, max_line_bytes=max_line_bytes)}
        assert bounded >= {number for number, _ in whole if number >= start_line}


@BATCH_SETTINGS
@given(lines=st.lists(st.integers(1, 1000), unique=True, max_size=20), capacity=st.integers(1, 6), data=st.data())
def test_any_order_becomes_the_order_of_the_beginning(lines: list[int], capacity: int, data: st.DataObject) -> None:
    reorder: Reorder[str] = Reorder(capacity)
    waiting = list(lines)
    in_flight: list[int] = []
    released: list[tuple[int, str]] = []
    while waiting or in_flight:
        while waiting and reorder.has_room:
            reorder.expect(waiting[0])
            in_flight.append(waiting.pop(0))
        line = data.draw(st.sampled_from(in_flight))
        in_flight.remove(line)
        released += reorder.push(line, str(line))
        assert reorder.num_held < capacity
    assert released == [(line, str(line)) for line in lines]


NAMES = st.sampled_from(["prompt", "prompt_token_ids", "custom_id", "priority", "max_tokens", *Sampling.__struct_fields__])
SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
BODIES = st.dictionaries(NAMES | st.text(max_size=3), VALUES, max_size=4)
PLAIN_LINES = BODIES | st.builds(lambda body: {"prompt": "a", **body}, BODIES)
OPENAI_LINES = st.builds(lambda body: {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}, PLAIN_LINES)


@BATCH_SETTINGS
@given(
    data=st.binary(max_size=20)
    | st.text(max_size=20)
    | st.one_of(VALUES, PLAIN_LINES, OPENAI_LINES).map(json.dumps)
    | st.one_of(PLAIN_LINES, OPENAI_LINES).map(lambda line: json.dumps(line, ensure_ascii=False))
)
def test_whatever_a_line_holds_it_is_a_request_or_invalid(data: bytes | str) -> None:
    find_custom_id(data)
    with contextlib.suppress(Invalid):
        request = parse_line(data, 1)
        assert request.prompt
        assert request.options.keys() <= set(Sampling.__struct_fields__)
        assert request.format in LineFormat
