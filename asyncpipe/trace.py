"""Spans of what stages did, as a Chrome trace that ui.perfetto.dev opens: a row for each stage, an arrow for each step.

The format is the JSON array of Google's "Trace Event Format": complete events ("X"), flow events ("s", "t", "f") and metadata
("M"). Times are microseconds of the coordinator's clock.
"""

from __future__ import annotations

import enum
import json
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from asyncpipe.errors import Invalid
from asyncpipe.wire.stage_messages import MAX_SPANS_PER_MESSAGE, Span, Spans

RING_SPANS = 65_536


class SpanKind(enum.IntEnum):
    """What a stage was doing."""

    STARVED = 0  # waiting for a step to arrive
    COMPUTE = 1  # a step on the compute thread
    SEND = 2  # handing the result to the next stage, or to the coordinator
    WEIGHTS = 3  # weights on their way between memory tiers


class SpanRing:
    """The last spans of a stage, numbered from 0; older ones are lost, and counted."""

    def __init__(self, capacity: int = RING_SPANS) -> None:
        self._spans: deque[Span] = deque(maxlen=capacity)
        self._num_added = 0

    def add(self, kind: SpanKind, *, micro_batch: int, step: int, start_ns: int, end_ns: int, num_rows: int) -> None:
        self._spans.append(Span(kind, micro_batch, step, start_ns, max(end_ns - start_ns, 0), num_rows))
        self._num_added += 1

    def since(self, first: int) -> Spans:
        """As many as one message takes, from number `first` on."""
        oldest = self._num_added - len(self._spans)
        start = max(first, oldest)
        spans = tuple(self._spans)[start - oldest : start - oldest + MAX_SPANS_PER_MESSAGE]
        return Spans(first=start, num_lost=oldest, spans=spans)


class ChromeTrace:
    """Writes the file span by span, so that its length is bounded by the disk alone. Use in `with`.

    Raises Invalid when the file cannot be written.
    """

    def __init__(self, path: Path, *, stage_names: Sequence[str]) -> None:
        self._path = path
        self._stage_names = stage_names
        self._file: TextIO | None = None
        self._is_first = True

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise Invalid(f"--trace {self._path}: {error.strerror or error}") from None
        self._file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for stage, name in enumerate(self._stage_names):
            self._write({"ph": "M", "name": "process_name", "pid": stage, "args": {"name": name}})
            self._write({"ph": "M", "name": "process_sort_index", "pid": stage, "args": {"sort_index": stage}})
            for kind in SpanKind:
                self._write({"ph": "M", "name": "thread_name", "pid": stage, "tid": kind, "args": {"name": kind.name.lower()}})
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.write("\n]}\n")
            self._file.close()

    def add(self, stage: int, spans: Iterable[Span], *, clock_offset_ns: int) -> None:
        """`clock_offset_ns` is what the stage's clock is ahead of the coordinator's."""
        for span in spans:
            kind = SpanKind(span.kind)
            start_us = (span.start_ns - clock_offset_ns) / 1000
            name = f"micro-batch {span.micro_batch}" if kind is SpanKind.COMPUTE else kind.name.lower()
            place = {"pid": stage, "tid": kind}
            details = {"micro_batch": span.micro_batch, "step": span.step, "rows": span.num_rows}
            self._write({"ph": "X", "name": name, "ts": start_us, "dur": span.duration_ns / 1000, "args": details, **place})
            if kind is SpanKind.COMPUTE and len(self._stage_names) > 1:
                self._flow(stage, span, at_us=start_us + span.duration_ns / 2000, place=place)

    def _flow(self, stage: int, span: Span, *, at_us: float, place: dict[str, int]) -> None:
        """An arrow from the step's span on the stage before to the one on the stage after."""
        phase = "s" if stage == 0 else "f" if stage == len(self._stage_names) - 1 else "t"
        flow = {"ph": phase, "cat": "step", "name": "step", "id": f"{span.micro_batch}.{span.step}", "ts": at_us, **place}
        self._write(flow | {"bp": "e"} if phase == "f" else flow)

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is None:
            raise Invalid("a ChromeTrace is used in `with`")
        self._file.write("\n" if self._is_first else ",\n")
        self._file.write(json.dumps(event))
        self._is_first = False
