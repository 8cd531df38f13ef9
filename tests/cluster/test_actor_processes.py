"""Actors in child processes: their errors, their deaths, and that they never outlive us."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncpipe.actors import ActorSystem
from asyncpipe.errors import Broken, Invalid
from asyncpipe.process import ChildProcess
from tests.contract.actors_under_test import Echo, Recorder
from tests.support import run

ROOT = Path(__file__).parents[2]
RECORDER = "tests.contract.actors_under_test:Recorder"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int, *, seconds: float) -> bool:
    deadline_s = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return not is_alive(pid)


def test_a_child_process_answers_and_is_gone_with_the_system() -> None:
    async def scenario() -> int:
        async with ActorSystem("parent") as system:
            ref = await system.spawn_process(RECORDER, name="child")
            answer = await ref.ask(Echo(value=4), timeout=5)
            assert (answer.value, answer.pid != os.getpid()) == (4, True)
            return answer.pid

    assert not is_alive(run(scenario()))


def test_watchers_hear_how_a_child_process_was_killed() -> None:
    async def scenario() -> None:
        watcher = Recorder()
        async with ActorSystem("parent") as system:
            ref = await system.spawn_process(RECORDER, name="child")
            pid = (await ref.ask(Echo(value=1), timeout=5)).pid
            system.monitor(ref, watcher=system.spawn(lambda: watcher, name="watcher"))
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(2):
                while not watcher.downs:
                    await asyncio.sleep(0.01)
            assert "child process child" in watcher.downs[0].error.message
            assert "SIGKILL" in watcher.downs[0].error.message
            with pytest.raises(Broken):
                await ref.ask(Echo(value=1), timeout=5)

    run(scenario())


def test_a_child_that_cannot_start_says_why() -> None:
    async def scenario() -> None:
        async with ActorSystem("parent") as system:
            with pytest.raises(Broken, match="no_such_module"):
                await system.spawn_process("no_such_module:Nothing", name="child")

    run(scenario())


def test_a_child_that_ignores_term_is_killed() -> None:
    async def scenario() -> None:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
        process = await ChildProcess.spawn([sys.executable, "-c", code], name="stubborn")
        await asyncio.sleep(0.3)
        await process.stop(kill_after_s=0.2)
        assert process.describe_exit() == "was killed by SIGKILL"

    run(scenario())


def test_the_tail_of_standard_error_is_kept_and_bounded() -> None:
    async def scenario() -> None:
        code = "import sys; [print('line', n, file=sys.stderr) for n in range(5000)]; sys.exit(3)"
        process = await ChildProcess.spawn([sys.executable, "-c", code], name="chatty")
        async with asyncio.timeout(10):
            assert await process.wait() == 3
        assert process.stderr_tail() == [f"line {n}" for n in range(4980, 5000)]
        assert process.describe_exit() == "exited with status 3"
        with pytest.raises(Invalid, match="cannot start"):
            await ChildProcess.spawn(["/no/such/program"], name="nothing")

    run(scenario())


def test_a_child_dies_with_a_parent_that_is_killed() -> None:
    code = (
        "import asyncio\n"
        "from asyncpipe.actors import ActorSystem\n"
        "from tests.contract.actors_under_test import Echo\n"
        "async def main():\n"
        "    async with ActorSystem('parent') as system:\n"
        f"        ref = await system.spawn_process({RECORDER!r}, name='child')\n"
        "        print((await ref.ask(Echo(value=1), timeout=5)).pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        assert is_alive(child_pid)
        parent.kill()
    assert wait_until_gone(child_pid, seconds=2.0)


def test_cancelling_at_any_moment_leaves_no_child_process() -> None:
    async def busy(pids: list[int]) -> None:
        async with ActorSystem("parent") as system:
            ref = await system.spawn_process(RECORDER, name="child")
            while True:
                pids.append((await ref.ask(Echo(value=1), timeout=5)).pid)

    async def scenario() -> list[int]:
        pids: list[int] = []
        for moment in range(10):
            await cancel_after(asyncio.ensure_future(busy(pids)), 0.07 * moment)
        task = asyncio.ensure_future(busy(pids))  # and once while it surely runs
        async with asyncio.timeout(20):
            while not pids:
                await asyncio.sleep(0.01)
        await cancel_after(task, 0.0)
        return pids

    async def cancel_after(task: asyncio.Future[None], seconds: float) -> None:
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    pids = set(run(scenario(), timeout_s=60))
    assert pids
    assert not [pid for pid in pids if is_alive(pid)]
