"""What a stage did with its time: counters for the status, spans for the trace."""

from __future__ import annotations

from pathlib import Path

from asyncpipe.trace import SpanKind, SpanRing
from asyncpipe.wire.messages import StageCounters, Step, TransferReport
from asyncpipe_workers.memory.transfers import TransferLog

STATUS = Path("/proc/self/status")
MIN_STARVED_NS = 20_000  # shorter gaps are not worth a span


class StageRecorder:
    """All times in nanoseconds of the monotonic clock."""

    def __init__(self) -> None:
        self.spans = SpanRing()
        self.transfers: TransferLog | None = None
        self._num_steps = 0
        self._busy_ns = self._send_wait_ns = 0
        self._first_start_ns = self._last_end_ns = 0

    def computed(self, step: Step, *, start_ns: int, end_ns: int, num_steps: int = 1) -> None:
        self._num_steps += num_steps
        self._busy_ns += end_ns - start_ns
        if not self._first_start_ns:
            self._first_start_ns = start_ns
        elif start_ns - self._last_end_ns > MIN_STARVED_NS:
            self._add(SpanKind.STARVED, step, self._last_end_ns, start_ns)
        self._last_end_ns = end_ns
        for move in self.transfers.take_moves() if self.transfers is not None else ():
            self._add(SpanKind.WEIGHTS, step, move.start_ns, move.end_ns)
        self._add(SpanKind.COMPUTE, step, start_ns, end_ns)

    def sent(self, step: Step, *, start_ns: int, end_ns: int) -> None:
        self._send_wait_ns += end_ns - start_ns
        self._add(SpanKind.SEND, step, start_ns, end_ns)

    def counters(self, stage: int) -> StageCounters:
        return StageCounters(
            stage=stage,
            steps=self._num_steps,
            busy_s=self._busy_ns / 1e9,
            send_wait_s=self._send_wait_ns / 1e9,
            span_s=(self._last_end_ns - self._first_start_ns) / 1e9,
            transfers=self.transfers.report() if self.transfers is not None else TransferReport(),
            peak_host_bytes=peak_memory_bytes(),
            peak_device_bytes=self.transfers.peak_device_bytes() if self.transfers is not None else 0,
        )

    def _add(self, kind: SpanKind, step: Step, start_ns: int, end_ns: int) -> None:
        rows = step.delta.num_rows
        self.spans.add(kind, micro_batch=step.micro_batch, step=step.step, start_ns=start_ns, end_ns=end_ns, num_rows=rows)


def peak_memory_bytes() -> int:
    """The most that this process has had in memory; 0 where the system does not say. (getrusage(2) would tell of the process
    that started this one, too.)"""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
