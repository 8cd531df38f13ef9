"""Workers that die or freeze, and Ctrl-C at any moment: streams go on or end with a clear error, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncpipe import Client, StageLost, connect
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.checkpoints import make_opt
from tests.clusters import until
from tests.support import run

MUST_HEAR_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"), max_positions=16_384)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> list[tuple[int, ...]]:
    """What `stream_all` gives when nobody dies."""

    async def scenario() -> list[tuple[int, ...]]:
        async with Service.open(two_stages(checkpoint)) as service, connect(await service.listen("memory://clients")) as client:
            return await stream_all(client, at_token=lambda _: None)

    return run(scenario(), timeout_s=60)


def two_stages(checkpoint: Path, **options: Any) -> ServiceConfig:
    return ServiceConfig(checkpoint=checkpoint, num_stages=2, threads_per_stage=1, **options)


async def stream_all(client: Client, *, at_token: Callable[[int], object]) -> list[tuple[int, ...]]:
    """Three streams at once, greedy and seeded; `at_token` hears the index of each token of the first."""

    async def one(number: int, temperature: float) -> tuple[int, ...]:
        token_ids: list[int] = []
        options = {"max_new_tokens": 120, "ignore_eos": True, "temperature": temperature, "seed": 7}
        async for piece in client.stream("to be"[: 2 + number], **options):
            assert piece.index == len(token_ids), "a token was lost or repeated"
            token_ids.append(piece.token_id)
            if number == 0:
                at_token(piece.index)
        return tuple(token_ids)

    return list(await asyncio.gather(one(0, 0.0), one(1, 0.8), one(2, 0.0)))


def test_streams_go_on_when_the_only_worker_dies_amid_several_steps(
    checkpoint: Path, undisturbed: list[tuple[int, ...]]
) -> None:
    """What it had not told of is computed again."""

    async def scenario() -> None:
        config = ServiceConfig(checkpoint=checkpoint, num_stages=1, threads_per_stage=1, spares=1)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            struck = (await client.status()).stages[0].pid
            killed = await stream_all(client, at_token=lambda index: index == 40 and os.kill(struck, signal.SIGKILL))
            assert killed == undisturbed
            assert (await client.status()).restarts == 1

    run(scenario(), timeout_s=60)


@pytest.mark.parametrize("spares", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("stage", [0, 1])
def test_streams_go_on_when_a_worker_dies_or_freezes(
    checkpoint: Path, undisturbed: list[tuple[int, ...]], number: signal.Signals, stage: int, spares: int
) -> None:
    """No token is lost, repeated or changed, and the other stage keeps its process."""

    async def scenario() -> None:
        config = two_stages(checkpoint, spares=spares)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            before = await client.status()
            struck = before.stages[stage].pid
            assert await stream_all(client, at_token=lambda index: index == 40 and os.kill(struck, number)) == undisturbed
            after = await client.status()
            assert after.stages[stage].pid != struck
            assert after.stages[1 - stage].pid == before.stages[1 - stage].pid
            assert after.restarts == 1
            assert (after.requests_failed, after.requests_finished) == (0, 3)
        assert not is_alive(struck)

    run(scenario(), timeout_s=60)


def test_streams_go_on_when_all_workers_die_at_once(checkpoint: Path, undisturbed: list[tuple[int, ...]]) -> None:
    async def scenario() -> None:
        async with Service.open(two_stages(checkpoint)) as service, connect(await service.listen("memory://clients")) as client:
            pids = [stage.pid for stage in (await client.status()).stages]

            def strike(index: int) -> None:
                if index == 40:
                    for pid in pids:
                        os.kill(pid, signal.SIGKILL)

            assert await stream_all(client, at_token=strike) == undisturbed

    run(scenario(), timeout_s=60)


def test_a_frozen_pipeline_is_noticed_in_time(checkpoint: Path) -> None:
    async def scenario() -> None:
        config = two_stages(checkpoint, max_restarts=0)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            frozen = (await client.status()).stages[1].pid
            with pytest.raises(StageLost, match=r"stage 1 of 2 .* was lost: .* silent"):
                struck_at_s = 0.0
                async for piece in client.stream("to be", max_new_tokens=2000, ignore_eos=True):
                    if piece.index == 3:
                        os.kill(frozen, signal.SIGSTOP)
                        struck_at_s = time.monotonic()
            assert time.monotonic() - struck_at_s < MUST_HEAR_WITHIN_S
            with pytest.raises(StageLost):
                await client.generate("to be", max_new_tokens=1)
            with pytest.raises(StageLost):
                await service.run()
        assert not is_alive(frozen)

    run(scenario(), timeout_s=60)


def test_a_crash_loop_ends_with_a_clear_error(checkpoint: Path) -> None:
    async def scenario() -> None:
        config = two_stages(checkpoint, max_restarts=2)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            stream = asyncio.ensure_future(client.generate("to be", max_new_tokens=16_000, ignore_eos=True))
            killed: list[int] = []
            while len(killed) < 3:
                status = await until(client, lambda status: status.state == "running" and status.restarts == len(killed))
                killed.append(status.stages[0].pid)
                os.kill(killed[-1], signal.SIGKILL)
            with pytest.raises(StageLost, match="stage 0 of 2"):
                await stream

    run(scenario(), timeout_s=60)


def heed_ctrl_c() -> None:
    """Shells let what they start in the background ignore it, such as a run of these tests, and what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
            preexec_fn=heed_ctrl_c,
        )
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=15)
        assert status != 0, "it had time to finish; make the job longer"
        assert not wait_for_none(marker, seconds=2.0), f"processes left after Ctrl-C at {delay_s:.2f} s"
    assert not list(Path("/dev/shm").glob("*asyncpipe*"))


def test_ctrl_c_ends_a_hundred_thousand_prompts_at_once(tmp_path: Path) -> None:
    """When all of them waited for their turn, each as a task, to cancel them took minutes."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import \n" * 100_000)
    command = [sys.executable, "-m", "asyncpipe_coordinator", "generate", "--prompt-file", str(prompts)]
    command += ["--device", "sim:layer_ms=1", "--json", "--quiet"]
    results = tmp_path / "results.jsonl"
    with results.open("wb") as output, subprocess.Popen(command, stdout=output, preexec_fn=heed_ctrl_c) as process:
        deadline_s = time.monotonic() + 30
        while not results.stat().st_size and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130
    assert results.stat().st_size


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
