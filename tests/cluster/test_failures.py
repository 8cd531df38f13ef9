"""Workers that die or freeze, and Ctrl-C at any moment: a clear error soon, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncpipe import StageLost, connect
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.checkpoints import make_opt
from tests.support import run

MUST_HEAR_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"), max_positions=16_384)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("stage", [0, 1])
def test_the_client_hears_which_stage_was_lost(checkpoint: Path, number: signal.Signals, stage: int) -> None:
    async def scenario() -> None:
        config = ServiceConfig(checkpoint=checkpoint, num_stages=2, threads_per_stage=1)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            pid = (await client.status()).stages[stage].pid
            with pytest.raises(StageLost, match=f"stage {stage}"):
                struck_at_s = 0.0
                async for piece in client.stream("to be", max_new_tokens=2000, ignore_eos=True):
                    if piece.index == 3:
                        os.kill(pid, number)
                        struck_at_s = time.monotonic()
            assert time.monotonic() - struck_at_s < MUST_HEAR_WITHIN_S
        assert not is_alive(pid)

    run(scenario(), timeout_s=60)


def test_a_service_starts_its_pipeline_again_after_a_loss(checkpoint: Path) -> None:
    async def scenario() -> None:
        config = ServiceConfig(checkpoint=checkpoint, num_stages=2, threads_per_stage=1)
        async with Service.open(config) as service, asyncio.TaskGroup() as group:
            serving = group.create_task(service.run())
            async with connect(await service.listen("memory://clients")) as client:
                before = await client.generate("to be", max_new_tokens=5)
                os.kill((await client.status()).stages[1].pid, signal.SIGKILL)
                await until_running_again(client)
                assert (await client.generate("to be", max_new_tokens=5)).token_ids == before.token_ids
            serving.cancel()

    run(scenario(), timeout_s=60)


async def until_running_again(client: object) -> None:
    for _ in range(100):
        try:
            await client.generate("x", max_new_tokens=1)  # type: ignore[attr-defined]
        except StageLost:
            await asyncio.sleep(0.1)
        else:
            return
    raise AssertionError("the pipeline did not come back")


def test_ctrl_c_at_any_moment_leaves_nothing_behind(checkpoint: Path) -> None:
    """From the first import to the last token: 16 moments, spread over the life of the command."""
    generator = random.Random(5)
    command = [sys.executable, "-m", "asyncpipe_coordinator", "generate", str(checkpoint), "--stages", "2"]
    command += ["--prompt", "to be", "--max-new-tokens", "16000", "--ignore-eos", "--quiet"]
    for moment in range(16):
        delay_s = 0.25 * moment + generator.random() * 0.25
        marker = f"asyncpipe-test-{os.getpid()}-{moment}"
        process = subprocess.Popen(
            command,
            env=os.environ | {"ASYNCPIPE_TEST_MARKER": marker},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=15)
        assert status != 0, "it had time to finish; make the job longer"
        assert not wait_for_none(marker, seconds=2.0), f"processes left after Ctrl-C at {delay_s:.2f} s"
    assert not list(Path("/dev/shm").glob("*asyncpipe*"))


def test_workers_die_with_a_coordinator_that_is_killed(checkpoint: Path) -> None:
    marker = f"asyncpipe-test-{os.getpid()}-killed"
    command = [sys.executable, "-m", "asyncpipe_coordinator", "serve", str(checkpoint), "--stages", "2", "--json"]
    with subprocess.Popen(
        [*command, "--bind", "tcp://127.0.0.1:0"],
        env=os.environ | {"ASYNCPIPE_TEST_MARKER": marker},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert b"tcp://127.0.0.1:" in process.stdout.readline()
        assert len(marked(marker)) == 3
        process.kill()
    assert not wait_for_none(marker, seconds=3.0)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def marked(marker: str) -> list[int]:
    """Running processes with `marker` in their environment: what a command started, and what that started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended
    return found


def wait_for_none(marker: str, *, seconds: float) -> list[int]:
    deadline_s = time.monotonic() + seconds
    while (left := marked(marker)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return left
