"""Engines in processes of their own, for `peers.py`: asked with a deadline, always ended, and as many as fit into memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from peer_cases import THREADS, Case, Model, Workload, engine_spec, kv_bytes
from peer_engines import PREPARE, RUN_TIMEOUT_S, Timing

from asyncpipe.process.reap import PARENT_VARIABLE

CHILD = Path(__file__).with_name("peer_engines.py")
OPEN_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 10.0
READ_BYTES = 65_536
SPARE = 1.6  # a start needs so many times the float32 weights: they are read, then packed or quantized


class EngineError(Exception):
    """Why an engine gave no figure, in one line."""


class OpenError(EngineError):
    """It cannot be opened, so that it gives none at all."""


class EngineProcess:
    """Runs `peer_engines.py`; its standard error goes to `log`. Close it."""

    def __init__(self, spec: dict[str, Any], *, log: Path) -> None:
        self._log, self._unread = log, b""
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(CHILD), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(spec["engine"]),
                start_new_session=True,  # Ctrl-C is for us: we end it
            )

    def ask(self, order: dict[str, Any] | None, *, timeout_s: float) -> dict[str, Any]:
        """Its answer to `order`; None: only wait for what it says. Raises EngineError."""
        if order is not None:
            self._send(order)
        answer: dict[str, Any] = json.loads(self._read_line(timeout_s))
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def close(self) -> None:
        """The end of its input ends it; if not, TERM, and then KILL."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        for end in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                end()
        self._process.wait()
        self._process.stdout.close()

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(self._describe_end()) from None

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline_s = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], max(deadline_s - time.monotonic(), 0.0))[0]:
                raise EngineError(f"no answer within {timeout_s:g} s")
            chunk = os.read(descriptor, READ_BYTES)
            if not chunk:
                raise EngineError(self._describe_end())
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _describe_end(self) -> str:
        try:
            status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "closed its output without an answer"
        last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return ": ".join([f"ended with status {status}", *(line[:200] for line in last)])


def _environment(engine: str) -> dict[str, str]:
    """Ours shares threads out by itself."""
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    if engine == "ours":
        return {name: value for name, value in environment.items() if name not in names}
    return environment | dict.fromkeys(names, str(THREADS))


class _Open(NamedTuple):
    case: Case
    process: EngineProcess


class Fleet:
    """The engines of one model. They stay while there is memory: idle, they take no processor time."""

    def __init__(self, model: Model, *, folder: Path, num_weights: int, max_batch: int) -> None:
        self._model, self._folder, self._max_batch = model, folder, max_batch
        self._needed_bytes = int(SPARE * 4 * num_weights) + kv_bytes(model, max_batch=max_batch, stages=1)
        self._open: dict[str, _Open] = {}
        self._prepared: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in list(self._open):
            self.close(name)

    def run(self, case: Case, workload: Workload, *, seed: int) -> Timing:
        """Raises EngineError, OpenError among them; the engine is then closed."""
        order = workload._asdict() | {"seed": seed}
        try:
            return Timing(**self._engine(case).ask(order, timeout_s=RUN_TIMEOUT_S))
        except EngineError:
            self.close(case.name)
            raise

    def close(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name).process.close()

    def _engine(self, case: Case) -> EngineProcess:
        """Opened if it is not, which may close others."""
        if case.name not in self._open:
            try:
                self._prepare(case)
                self._make_room()
                self._open[case.name] = _Open(case, self._spawn(case, prepare=False))
                self._open[case.name].process.ask(None, timeout_s=OPEN_TIMEOUT_S)
            except EngineError as error:
                raise OpenError(str(error)) from None
        return self._open[case.name].process

    def _prepare(self, case: Case) -> None:
        """What it needs on disk, by a process of its own, whose memory is gone then."""
        if case.engine not in PREPARE or case.name in self._prepared:
            return
        self._make_room()
        process = self._spawn(case, prepare=True)
        try:
            process.ask(None, timeout_s=OPEN_TIMEOUT_S)
        finally:
            process.close()
        self._prepared.add(case.name)

    def _spawn(self, case: Case, *, prepare: bool) -> EngineProcess:
        spec = engine_spec(case, self._model, folder=self._folder, max_batch=self._max_batch)
        return EngineProcess(spec | {"prepare": prepare}, log=self._folder / f"{case.name}.log")

    def _make_room(self) -> None:
        """The largest ones go first: so the small ones stay through all rounds."""
        while self._open and available_bytes() < self._needed_bytes:
            largest = max(self._open.values(), key=lambda entry: entry.case.bytes_per_weight)
            self.close(largest.case.name)


def available_bytes() -> int:
    """Of memory, page cache included."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
