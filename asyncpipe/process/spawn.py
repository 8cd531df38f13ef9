"""Child processes that are always reaped, and whose last words are kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence

from asyncpipe.errors import Invalid
from asyncpipe.process.reap import PARENT_VARIABLE

TAIL_LINES = 20
MAX_LINE_CHARS = 2000
READ_BYTES = 65_536
KILL_AFTER_S = 5.0


class ChildProcess:
    """Made by `spawn`. The child has a session of its own: Ctrl-C in a terminal reaches only us, and we stop it in order."""

    def __init__(self, process: asyncio.subprocess.Process, *, name: str, stderr_fd: int) -> None:
        self._process = process
        self._stderr = _Tail(stderr_fd)
        self.name = name

    @classmethod
    async def spawn(
        cls,
        argv: Sequence[str],
        *,
        name: str,
        env: Mapping[str, str] | None = None,
        stdout: int = asyncio.subprocess.DEVNULL,
    ) -> ChildProcess:
        """Start `argv`. Its standard input is empty, the tail of its standard error is kept, and its output is dropped; with
        `stdout=PIPE` it is `output`, to be read to its end.

        Raises Invalid when there is no such program.
        """
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        environment = {**(os.environ if env is None else env), PARENT_VARIABLE: str(os.getpid())}
        # Its own task, for a cancelled start may have started: whoever cancels it must not leave a process behind.
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stdout,
                stderr=write_fd,
                env=environment,
                start_new_session=True,
            )
        )
        try:
            process = await asyncio.shield(starting)
        except OSError as error:
            os.close(read_fd)
            raise Invalid(f"cannot start {argv[0]}: {error.strerror}") from None
        except BaseException:
            os.close(read_fd)
            await _undo(starting)
            raise
        finally:
            os.close(write_fd)
        return cls(process, name=name, stderr_fd=read_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> asyncio.StreamReader:
        """Its standard output. Raises Invalid when it was started without."""
        if self._process.stdout is None:
            raise Invalid(f"{self.name} was started without a pipe for its output")
        return self._process.stdout

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal's number when one ended it."""
        return self._process.returncode

    async def wait(self) -> int:
        """Until it ends, which may be never: whoever waits brings the deadline."""
        returncode = await self._process.wait()
        self._stderr.close()
        return returncode

    async def stop(self, *, term_after_s: float = 0.0, kill_after_s: float = KILL_AFTER_S) -> None:
        """TERM once `term_after_s` has passed without an end, KILL `kill_after_s` later; returns when it is reaped."""
        try:
            if term_after_s and await self._ended_within(term_after_s):
                return
            self._signal(signal.SIGTERM)
            if not await self._ended_within(kill_after_s):
                self._signal(signal.SIGKILL)
        except asyncio.CancelledError:
            self._signal(signal.SIGKILL)  # no time for manners
            raise
        finally:
            await self.wait()

    def stderr_tail(self) -> list[str]:
        """The last lines it wrote to standard error, oldest first."""
        self._stderr.read()
        return self._stderr.lines()

    def describe_exit(self) -> str:
        """For error messages: "was killed by SIGKILL", "exited with status 3"."""
        returncode = self.returncode
        if returncode is None:
            return "is running"
        if returncode < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-returncode).name}"
        return f"exited with status {returncode}"

    async def _ended_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wait()
        return self.returncode is not None

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                self._process.send_signal(number)
                self._process.send_signal(signal.SIGCONT)  # a stopped process takes TERM only when it goes on


class _Tail:
    """Reads a pipe as it fills and keeps its last lines."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd
        self._loop = asyncio.get_running_loop()
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._partial = ""
        self._loop.add_reader(fd, self.read)

    def read(self) -> None:
        while self._fd is not None:
            try:
                chunk = os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                return
            if not chunk:
                self.close()
                return
            *complete, self._partial = (self._partial + chunk.decode(errors="replace")).split("\n")
            self._lines.extend(line[:MAX_LINE_CHARS] for line in complete if line.strip())
            self._partial = self._partial[-MAX_LINE_CHARS:]

    def lines(self) -> list[str]:
        return [*self._lines, self._partial] if self._partial.strip() else list(self._lines)

    def close(self) -> None:
        """Take what is there and let go; a grandchild that still holds the pipe must not keep us."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        self._loop.remove_reader(fd)
        with contextlib.suppress(BlockingIOError):
            rest = os.read(fd, READ_BYTES).decode(errors="replace")
            self._lines.extend(line[:MAX_LINE_CHARS] for line in (self._partial + rest).split("\n") if line.strip())
            self._partial = ""
        os.close(fd)


async def _undo(starting: asyncio.Future[asyncio.subprocess.Process]) -> None:
    """Starting takes milliseconds; what has started is killed and reaped."""
    with contextlib.suppress(OSError):
        process = await starting
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
