"""The results of a batch, written so that a killed run can be continued.

The contract: the process may be killed at any moment; run again with the same arguments until it ends, it leaves exactly one
record for every input line that is not blank, either in the output file or in the errors file. It holds because

- a record is one appended line; a line without its newline is one that was being written when the process died, and is cut
  off at the next opening;
- a record names its input line (`"line": N`), so the files themselves say what is done;
- OUTPUT.progress.json, written before the first record, says which input, model and options the records belong to;
- a lock keeps a second run out. The kernel drops it when the process dies.

Memory does not grow with the files, but for one bit an input line.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from asyncpipe.errors import AsyncPipeError, Closed, Invalid, to_data
from asyncpipe_coordinator.batch_input import BUFFER_BYTES, os_errors, reading
from asyncpipe_coordinator.batch_order import LineSet

SYNC_PERIOD_S = 5.0
ERRORS_SUFFIX = ".errors.jsonl"
PROGRESS_SUFFIX = ".progress.json"

_HASHED_BYTES = 2**20
_AFRESH = "choose another --output, or --overwrite to start afresh"

# --- which run the results belong to ----------------------------------------------------------------------------------


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What OUTPUT.progress.json holds: the arguments of a run, so that another run does not continue its output."""

    input: str
    input_bytes: int
    input_mtime_ns: int
    input_sha256: str  # of the first MiB
    errors: str
    fingerprint: str

    @classmethod
    def of(cls, input_path: Path, *, errors: Path, fingerprint: str) -> Progress:
        """Raises Invalid when the input cannot be read."""
        with reading(input_path) as stream:
            status = os.fstat(stream.fileno())
            digest = hashlib.sha256(stream.read(_HASHED_BYTES)).hexdigest()
        return cls(
            input=os.path.abspath(input_path),
            input_bytes=status.st_size,
            input_mtime_ns=status.st_mtime_ns,
            input_sha256=digest,
            errors=os.path.abspath(errors),
            fingerprint=fingerprint,
        )

    @classmethod
    def load(cls, path: Path) -> Progress | None:
        """None when there is no such file, or it is damaged."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise Invalid(f"cannot read {path}: {error.strerror}") from None

    def save(self, path: Path) -> None:
        """All of it or nothing, also when the machine stops."""
        partial = path.with_name(path.name + ".tmp")
        with os_errors(f"cannot write {path}", Invalid):
            with partial.open("wb") as stream:
                stream.write(msgspec.json.encode(self) + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)

    def difference(self, now: Progress) -> str | None:
        """What differs between the run that began (self) and the run `now`, in words."""
        if self.input != now.input:
            return f"its input was {self.input}; now it is {now.input}"
        if self.input_bytes != now.input_bytes:
            return f"{now.input} had {self.input_bytes} bytes then and has {now.input_bytes} now"
        if self.input_sha256 != now.input_sha256:
            return f"the beginning of {now.input} has changed since"
        if self.input_mtime_ns != now.input_mtime_ns:
            return f"{now.input} has been modified since"
        if self.errors != now.errors:
            return f"its errors went to {self.errors}; now they would go to {now.errors}"
        if self.fingerprint != now.fingerprint:
            return "the model or the options were different"
        return None


# --- the results ------------------------------------------------------------------------------------------------------


class ResultWriter:
    """Owns the output file and the errors file (default: OUTPUT.errors.jsonl) of one run, new or continued.

    Use it as a context manager. Entering raises Invalid when the files belong to another run, are no results, are being
    written to by another process, or cannot be opened; `overwrite` starts afresh instead of continuing. `fingerprint` stands
    for the model and the options. The errors file is made by the first error; without it, a continued run tries those lines
    again. A run that is complete is continued by doing nothing.
    """

    def __init__(
        self,
        output: Path,
        *,
        input_path: Path,
        fingerprint: str,
        errors: Path | None = None,
        overwrite: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._input_path = input_path
        self._fingerprint = fingerprint
        self._output = _AppendFile(output)
        self._errors = _AppendFile(errors or output.with_name(output.name + ERRORS_SUFFIX))
        self._progress_path = output.with_name(output.name + PROGRESS_SUFFIX)
        self._overwrite = overwrite
        self._clock = clock
        self._synced_at_s = clock()
        self._done = LineSet()
        self._num_errors = 0

    @property
    def num_done(self) -> int:
        """Input lines that have a result or an error, from this run or the ones before."""
        return len(self._done)

    @property
    def num_errors(self) -> int:
        """Those of them that have an error."""
        return self._num_errors

    def is_done(self, line: int) -> bool:
        return line in self._done

    def write_result(self, line: int, result: Mapping[str, Any]) -> None:
        """Append `result`. Raises AsyncPipeError when it cannot be written, and the file is then as before."""
        self._append(self._output, line, {**result, "line": line})

    def write_error(self, line: int, custom_id: str | None, error: BaseException) -> None:
        """Append to the errors file why `line` has no result. Raises like `write_result`."""
        data = to_data(error)
        record = {"line": line, "custom_id": custom_id, "error": {"code": data.code.value, "message": data.message}}
        self._append(self._errors, line, record)
        self._num_errors += 1

    def finish(self) -> None:
        """Every line is done: put the records on the disk. OUTPUT.progress.json stays, so that running again does nothing."""
        self._check_open()
        self._sync()

    def __enter__(self) -> ResultWriter:
        now = Progress.of(self._input_path, errors=self._errors.path, fingerprint=self._fingerprint)
        self._check_paths()
        try:
            self._open(now)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            self._sync()
        finally:
            self._close()

    def _open(self, now: Progress) -> None:
        self._output.open()
        if self._errors.path.exists():
            self._errors.open()
        if self._overwrite:
            self._output.clear()
            self._errors.remove()
        if self._output.size or self._errors.size:
            self._check_same_run(now)
            self._recover(self._output, largest=now.input_bytes)
            if self._errors.is_open:
                self._num_errors = self._recover(self._errors, largest=now.input_bytes)
        else:
            now.save(self._progress_path)

    def _check_paths(self) -> None:
        """Writing over the input would be the worst of mistakes."""
        names: dict[str, str] = {}
        for name, path in (
            ("--input", self._input_path),
            ("--output", self._output.path),
            ("--errors", self._errors.path),
            (f"--output's {PROGRESS_SUFFIX}", self._progress_path),
        ):
            first = names.setdefault(os.path.realpath(path), name)
            if first != name:
                raise Invalid(f"{first} and {name} are the same file, {path}: choose another")

    def _check_same_run(self, now: Progress) -> None:
        begun = Progress.load(self._progress_path)
        if begun is None:
            path = self._output.path if self._output.size else self._errors.path
            raise Invalid(f"{path} is not empty, and no readable {self._progress_path.name} says which run it is of: {_AFRESH}")
        if difference := begun.difference(now):
            raise Invalid(f"{self._output.path} holds the results of another run ({difference}): {_AFRESH}")

    def _recover(self, file: _AppendFile, *, largest: int) -> int:
        """Learn from `file` which lines are done, and return how many those are. `largest` bounds the memory for it."""
        num_before = len(self._done)
        for number, record in enumerate(file.recover(), 1):
            try:
                line = msgspec.json.decode(record, type=_Record).line
            except (ValueError, RecursionError):
                line = 0
            if not 1 <= line <= largest:
                raise Invalid(f"{file.path}:{number} is not a record of this run: {_AFRESH}")
            self._done.add(line)
        return len(self._done) - num_before

    def _append(self, file: _AppendFile, line: int, record: Mapping[str, Any]) -> None:
        self._check_open()
        if line in self._done:
            raise Invalid(f"line {line} is done: it has a record already")
        if not file.is_open:
            file.open()
        file.append(msgspec.json.encode(record) + b"\n")
        self._done.add(line)
        if self._clock() - self._synced_at_s >= SYNC_PERIOD_S:
            self._sync()

    def _check_open(self) -> None:
        if not self._output.is_open:
            raise Closed("this ResultWriter is not open: use it within its `with` block")

    def _sync(self) -> None:
        self._output.sync()
        self._errors.sync()
        self._synced_at_s = self._clock()

    def _close(self) -> None:
        self._output.close()
        self._errors.close()


class _Record(msgspec.Struct):
    """What every record of both files has."""

    line: int


class _AppendFile:
    """A file that this process alone appends whole lines to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # bytes
        self._fd = -1
        self._is_synced = True

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def open(self) -> None:
        """Open or make it, and lock it. Raises Invalid; it is then not open."""
        with os_errors(f"cannot write to {self.path}", Invalid):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self._lock()
            except BaseException:
                self.close()
                raise

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise Invalid(f"cannot write to {self.path}: it is not a regular file")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Invalid(f"another run is writing to {self.path}: wait for its end, or choose another file") from None
        self.size = os.fstat(self._fd).st_size

    def recover(self) -> Iterator[bytes]:
        """Its whole lines. To be run to the end: a last line that was cut short is then cut off."""
        end = 0
        with (
            os_errors(f"cannot read {self.path}", Invalid),
            open(self._fd, "rb", buffering=BUFFER_BYTES, closefd=False) as stream,
        ):
            for line in stream:
                if line.endswith(b"\n"):
                    yield line
                    end += len(line)
        self._cut(end)

    def append(self, line: bytes) -> None:
        """Raises AsyncPipeError when not all of `line` could be written; nothing of it is then left in the file."""
        try:
            with os_errors(f"cannot write to {self.path}", AsyncPipeError, "; the same command continues from here"):
                written = os.write(self._fd, line)
                while written < len(line):  # a signal, or a full disk, which the next attempt tells
                    written += os.write(self._fd, line[written:])
        except AsyncPipeError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        self.size += len(line)
        self._is_synced = False

    def sync(self) -> None:
        """Raises AsyncPipeError."""
        if not self._is_synced:
            with os_errors(f"cannot write to {self.path}", AsyncPipeError):
                os.fsync(self._fd)
            self._is_synced = True

    def clear(self) -> None:
        self._cut(0)

    def remove(self) -> None:
        if self.is_open:
            self._cut(0)
            self.path.unlink()
            self.close()

    def close(self) -> None:
        if self.is_open:
            os.close(self._fd)
            self._fd = -1

    def _cut(self, size: int) -> None:
        if size < self.size:
            with os_errors(f"cannot write to {self.path}", Invalid):
                os.ftruncate(self._fd, size)
            self.size = size
