"""Workers that join from outside, coordinators that come back, and clients that go on with them: over tcp, with keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from asyncpipe import Broken, Client, Invalid, Refused, Timeout, connect
from asyncpipe.process import ChildProcess
from asyncpipe.process.reap import PARENT_VARIABLE
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.cli import main as coordinator_main
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.checkpoints import make_opt
from tests.support import run

NUM_TOKENS = 150


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"), max_positions=16_384)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> tuple[int, ...]:
    async def scenario() -> tuple[int, ...]:
        config = ServiceConfig(checkpoint=checkpoint, threads_per_stage=1)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            return await stream(client)

    return run(scenario(), timeout_s=60)


async def stream(
    client: Client, *, at_token: Callable[[int], object] = lambda _: None, resume: bool = False
) -> tuple[int, ...]:
    """Seeded by the coordinator; `at_token` hears each token's index."""
    token_ids: list[int] = []
    async for piece in client.stream("to be", max_new_tokens=NUM_TOKENS, ignore_eos=True, resume=resume):
        assert piece.index == len(token_ids), "a token was lost or repeated"
        token_ids.append(piece.token_id)
        at_token(piece.index)
    return tuple(token_ids)


@dataclass
class Cluster:
    """Processes as people start them, all on one port."""

    model: Path
    keys: Path | None
    address: str
    processes: list[ChildProcess] = field(default_factory=list)

    async def coordinator(self, *options: str) -> ChildProcess:
        argv = [sys.executable, "-m", "asyncpipe_coordinator", "serve", str(self.model), "--workers", "external"]
        return await self._start([*argv, "--bind", self.address, *options], name="coordinator")

    async def worker(self, *options: str, keys: Path | None = None) -> ChildProcess:
        argv = [sys.executable, "-m", "asyncpipe_workers", "--coordinator", self.address, "--log-level", "info"]
        return await self._start([*argv, *options], name="worker", keys=keys)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with connect(self.address, keys=self.keys, timeout_s=30.0) as client:
            yield client

    async def _start(self, argv: list[str], *, name: str, keys: Path | None = None) -> ChildProcess:
        chosen = keys or self.keys
        env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ASYNCPIPE_KEYS": str(chosen)} if chosen else {})
        process = await ChildProcess.spawn(argv, env=env, name=name)
        self.processes.append(process)
        return process


@contextlib.asynccontextmanager
async def cluster(model: Path, keys: Path | None = None) -> AsyncIterator[Cluster]:
    with socket.socket() as probe:  # a port for a coordinator that comes back to the same one
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Cluster(model, keys, f"tcp://127.0.0.1:{port}")
    try:
        yield made
    finally:
        await asyncio.gather(*(process.stop() for process in made.processes))


async def until(client: Client, condition: Callable[[Status], object]) -> Status:
    async with asyncio.timeout(60):
        while not condition(status := await client.status()):
            await asyncio.sleep(0.05)
    return status


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


def test_workers_of_torchrun_find_the_coordinator_and_become_the_stages_of_their_ranks(
    checkpoint: Path, undisturbed: tuple[int, ...]
) -> None:
    async def scenario() -> None:
        async with cluster(checkpoint) as machines:
            await machines.coordinator("--stages", "2")
            port = machines.address.rpartition(":")[2]
            # What tells a child of ours to end with us would end torchrun's own children.
            argv = ["env", "-u", PARENT_VARIABLE, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            argv += ["--master-addr", "127.0.0.1", "--master-port", "0", "--no-python"]
            argv += [sys.executable, "-m", "asyncpipe_workers", "--device", "cpu"]
            torchrun = await ChildProcess.spawn(argv, env=os.environ | {"ASYNCPIPE_PORT": port}, name="torchrun")
            machines.processes.append(torchrun)
            async with machines.client() as client:
                status = await until(client, lambda status: status.state == "running")
                assert await stream(client) == undisturbed
                ranks = [environment(stage.pid)["RANK"] for stage in status.stages]
                assert ranks == ["0", "1"]

    run(scenario(), timeout_s=90)


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


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


def test_strangers_are_refused(checkpoint: Path, keys: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        others = tmp_path / "others"
        assert coordinator_main(["keygen", str(others)]) == 0
        mixed = tmp_path / "mixed"  # knows the coordinator, which does not know it
        assert coordinator_main(["keygen", str(mixed)]) == 0
        (mixed / "coordinator.key").write_bytes((keys / "coordinator.key").read_bytes())
        async with cluster(checkpoint, keys) as machines:
            await machines.coordinator()
            await machines.worker()
            async with machines.client() as client:
                await until(client, lambda status: status.state == "running")
                stranger = await machines.worker(keys=mixed)
                assert await stranger.wait() == 1
                assert "key" in stranger.stderr_tail()[-1]
                for bad in (others, mixed):
                    with pytest.raises((Refused, Timeout)):
                        async with connect(machines.address, keys=bad, timeout_s=2.0):
                            pass
                assert (await client.status()).spares == 0
                worker_port = listening_port((await client.status()).stages[0].pid)
                for directory in (keys, mixed):  # a worker takes nobody but the stage before it
                    with pytest.raises((Refused, Timeout)):
                        async with connect(f"tcp://127.0.0.1:{worker_port}", keys=directory, timeout_s=2.0):
                            pass
                assert len(await stream(client)) == NUM_TOKENS

    run(scenario(), timeout_s=60)


def listening_port(pid: int) -> int:
    """The one tcp port that a process listens on."""
    sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (address,) = {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}
    return int(address.rpartition(":")[2], 16)


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
