"""A coordinator and its workers as people start them, each a process of its own, and a client of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from asyncpipe import Client, connect
from asyncpipe.process import ChildProcess
from asyncpipe.process.reap import PARENT_VARIABLE
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.support import run

NUM_TOKENS = 150


def undisturbed_stream(checkpoint: Path) -> tuple[int, ...]:
    """What one process makes of the prompt of `stream`."""

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

    async def launcher(self, *argv: str) -> ChildProcess:
        """It starts the workers. What tells a child of ours to end with us would end those, for they are its children."""
        port = self.address.rpartition(":")[2]
        return await self._start(["env", "-u", PARENT_VARIABLE, f"ASYNCPIPE_PORT={port}", *argv], name="launcher")

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
    made = Cluster(model, keys, f"tcp://127.0.0.1:{free_port()}")  # a coordinator may come back to the same one
    try:
        yield made
    finally:
        await asyncio.gather(*(process.stop() for process in made.processes))
        for process in made.processes:
            print(process.name, process.describe_exit(), *process.stderr_tail(), sep="\n    ")  # shown if the test fails


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(client: Client, condition: Callable[[Status], object], *, timeout_s: float = 60.0) -> Status:
    async with asyncio.timeout(timeout_s):
        while not condition(status := await client.status()):
            await asyncio.sleep(0.02)
    return status
