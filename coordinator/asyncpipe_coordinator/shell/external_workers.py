"""Workers that somebody else starts, here or on other machines: they join, wait as spares, and are given to stages."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from asyncpipe.actors import ActorRef
from asyncpipe.errors import AsyncPipeError
from asyncpipe.errors import Timeout as DeadlinePassed
from asyncpipe.ids import NodeId
from asyncpipe.wire.messages import Join
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.shell.workers import OnProgress, Worker

log = logging.getLogger(__name__)

GIB = 1 << 30


Identity = tuple[str, str, int]


class ExternalWorkers:
    """A `WorkerSource`. `drop` ends the links to a node, which makes its worker join anew."""

    def __init__(
        self, *, join_timeout_s: float, drop: Callable[[NodeId, AsyncPipeError], None], on_progress: OnProgress
    ) -> None:
        self._join_timeout_s = join_timeout_s
        self._drop = drop
        self._on_progress = on_progress
        self._spares: list[Worker] = []
        self._discarded: set[Identity] = set()
        self._came = asyncio.Event()

    async def gather(self, stages: Collection[int]) -> Mapping[int, Worker]:
        """Waits until there are enough, so that each can get the stage that it asks for."""
        try:
            async with asyncio.timeout(self._join_timeout_s):
                while len(self._spares) < len(stages):
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise DeadlinePassed(
                f"{len(self._spares)} of {len(stages)} workers that are needed came within {self._join_timeout_s:g} s"
            ) from None
        chosen = match(stages, self._spares)
        for stage, worker in sorted(chosen.items()):
            self._spares.remove(worker)
            self._on_progress(f"stage {stage}: {describe(worker.join)}")
        return chosen

    def discard(self, worker: Worker, error: AsyncPipeError) -> None:
        """Others come first when it has joined again."""
        self._discarded.add(_identity(worker.join))
        self._drop(worker.ref.node, error)

    def on_join(self, join: Join, sender: ActorRef) -> None:
        if _identity(join) in self._discarded:
            self._discarded.remove(_identity(join))
            join = msgspec.structs.replace(join, stage=None, rank=None)
        self._spares.append(Worker(join, sender))
        log.info("joined: %s", describe(join))
        self._on_progress(f"{describe(join)} joined", steps=0)
        self._came.set()

    def on_down(self, ref: ActorRef, error: AsyncPipeError) -> None:
        for worker in [worker for worker in self._spares if worker.ref == ref]:
            self._spares.remove(worker)
            log.info("a spare worker left: %s: %s", describe(worker.join), error)

    @property
    def num_spares(self) -> int:
        return len(self._spares)

    async def stop(self) -> None:
        """They go on, and wait for the next coordinator."""


def match(stages: Collection[int], workers: Sequence[Worker]) -> dict[int, Worker]:
    """One worker for each stage: first to those who hold its weights, then to those whose rank it is, then in order of
    joining. There are at least as many workers as stages."""
    chosen: dict[int, Worker] = {}
    wishes: tuple[Callable[[Join], int | None], ...] = (lambda join: join.stage, lambda join: join.rank)
    for wish in wishes:
        for worker in workers:
            stage = wish(worker.join)
            if stage is not None and stage in stages and stage not in chosen and worker not in chosen.values():
                chosen[stage] = worker
    others = iter([worker for worker in workers if worker not in chosen.values()])
    return chosen | {stage: next(others) for stage in stages if stage not in chosen}


def _identity(join: Join) -> Identity:
    """Of a process, also under another link."""
    return join.machine, join.host, join.pid


def join_hint(config: ServiceConfig, address: str, *, with_keys: bool) -> str:
    """What to type where the workers are to be."""
    keys = " --keys DIR" if with_keys else ""
    where = ", once for each device, with a worker's keys in DIR:" if with_keys else ", once for each device:"
    return (
        f"waiting for {config.num_stages} workers at {address}; on each machine{where}\n"
        f"  asyncpipe-worker --coordinator {reachable(address)} --device {config.device}{keys}"
    )


def reachable(address: str) -> str:
    """Of a wildcard address, the one that other machines can try."""
    for wildcard in ("//0.0.0.0:", "//*:", "//[::]:"):
        address = address.replace(wildcard, f"//{socket.gethostname()}:", 1)
    return address


def describe(join: Join) -> str:
    """For people: "pid 4711 on box-2, cuda:0 (NVIDIA H100 80GB HBM3), 79.2 GiB"."""
    device = f"{join.device} ({join.device_name})" if join.device_name else join.device
    memory = f", {join.memory_bytes / GIB:.1f} GiB" if join.memory_bytes else ""
    return f"pid {join.pid} on {join.host}, {device}{memory}"
