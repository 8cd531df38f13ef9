"""Workers that join from outside, coordinators that come back, and clients that go on with them: over tcp, with keys."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from asyncpipe import Broken, Invalid, connect
from asyncpipe.process import ChildProcess
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.checkpoints import make_opt
from tests.clusters import cluster, stream, undisturbed_stream, until
from tests.support import run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"), max_positions=16_384)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> tuple[int, ...]:
    return undisturbed_stream(checkpoint)


def test_workers_join_with_keys_and_a_lost_one_is_replaced_by_a_spare(
    checkpoint: Path, keys: Path, undisturbed: tuple[int, ...]
) -> None:
    async def scenario() -> None:
        async with cluster(checkpoint, keys) as machines:
            await machines.worker()  # before there is a coordinator
            await machines.coordinator("--stages", "2")
            await machines.worker()
            async with machines.client() as client:
                before = await until(client, lambda status: status.state == "running")
                await machines.worker()
                await until(client, lambda status: status.spares == 1)
                struck = before.stages[1].pid
                assert await stream(client, at_token=lambda i: i == 40 and os.kill(struck, signal.SIGKILL)) == undisturbed
                after = await client.status()
                assert after.stages[0].pid == before.stages[0].pid
                assert (after.restarts, after.spares, after.requests_failed) == (1, 0, 0)

    run(scenario(), timeout_s=90)


def test_a_coordinator_that_comes_back_finds_its_workers_and_the_client_goes_on(
    checkpoint: Path, keys: Path, undisturbed: tuple[int, ...]
) -> None:
    """The workers keep their weights: the second start reads nothing."""

    async def scenario() -> None:
        async with cluster(checkpoint, keys) as machines:
            first = await machines.coordinator("--stages", "2")
            workers = [await machines.worker() for _ in range(2)]
            async with machines.client() as client:
                before = await until(client, lambda status: status.state == "running")
                second: list[asyncio.Future[ChildProcess]] = []

                def strike(index: int) -> None:
                    if index == 40:
                        os.kill(first.pid, signal.SIGKILL)
                        second.append(asyncio.ensure_future(machines.coordinator("--stages", "2")))

                assert await stream(client, at_token=strike, resume=True) == undisturbed
                await second[0]
                after = await client.status()
                assert [stage.pid for stage in after.stages] == [stage.pid for stage in before.stages]
                for worker in workers:
                    assert any("the coordinator is lost" in line for line in worker.stderr_tail())
                    assert any("keeps what it holds" in line for line in worker.stderr_tail())

    run(scenario(), timeout_s=90)


def test_without_resume_the_client_hears_that_the_coordinator_is_gone(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with cluster(checkpoint) as machines:
            coordinator = await machines.coordinator()
            await machines.worker()
            async with machines.client() as client:
                await until(client, lambda status: status.state == "running")
                with pytest.raises(Broken, match="coordinator"):
                    await stream(client, at_token=lambda i: i == 10 and os.kill(coordinator.pid, signal.SIGKILL))

    run(scenario(), timeout_s=60)


def test_other_machines_are_not_let_in_without_keys(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with cluster(checkpoint) as machines:
            machines.address = "tcp://0.0.0.0:0"
            coordinator = await machines.coordinator()
            assert await coordinator.wait() == 2
            assert "keygen" in coordinator.stderr_tail()[-1]

    run(scenario(), timeout_s=30)


def test_resume_is_for_one_text(checkpoint: Path) -> None:
    async def scenario() -> None:
        config = ServiceConfig(checkpoint=checkpoint, threads_per_stage=1)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            with pytest.raises(Invalid, match="n=2"):
                await client.generate("x", n=2, resume=True)

    run(scenario(), timeout_s=30)


def test_the_join_command_is_shown(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    async def scenario() -> None:
        async with cluster(checkpoint) as machines:
            coordinator = await machines.coordinator("--join-timeout", "0.5", "--stages", "3")
            assert await coordinator.wait() == 1
            lines = coordinator.stderr_tail()
            assert f"  asyncpipe-worker --coordinator {machines.address} --device cpu" in lines
            assert "0 of 3 workers that are needed came within 0.5 s" in lines[-1]

    run(scenario(), timeout_s=30)
