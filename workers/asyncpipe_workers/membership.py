"""A worker's place at a coordinator: found, joined, and found again when the coordinator comes back."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from asyncpipe.actors import ActorRef, ActorSystem
from asyncpipe.cores import find_cores
from asyncpipe.errors import AsyncPipeError, Broken, Closed, Timeout
from asyncpipe.machine import machine_id
from asyncpipe.wire.messages import Join
from asyncpipe_workers.device import DeviceFacts
from asyncpipe_workers.stage import StageActor

JOIN_TIMEOUT_S = 10.0
LEAST_PATIENCE_S = 1.0
TRY_AGAIN_S = 0.2  # after a refusal or a loss; an address where nobody answers takes JOIN_TIMEOUT_S by itself

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What this worker says of itself to each coordinator that it joins."""

    system: ActorSystem
    actor: StageActor
    stage: ActorRef  # the actor's
    coordinator: str  # an address
    address: str  # where the stage before finds us
    public_key: str
    device: DeviceFacts
    slot: int | None
    rank: int | None
    search_s: float

    async def serve_once(self) -> AsyncPipeError:
        """Until the coordinator is lost; returns how. Raises Timeout when there is none, Refused when it does not want us."""
        lost = await self._join()
        return await lost  # no deadline: serving has none, and the link to the coordinator has one

    async def serve(self) -> None:
        """One coordinator after another, with what is loaded kept between them. Raises Timeout when none was to be found for
        `search_s` seconds, Refused by one that does not want us."""
        while True:
            error = await patiently(self.serve_once, coordinator=self.coordinator, search_s=self.search_s)
            log.warning("the coordinator is lost (%s); looking for it again for %g s", error, self.search_s)

    async def _join(self) -> asyncio.Future[AsyncPipeError]:
        patience_s = max(min(self.search_s, JOIN_TIMEOUT_S), LEAST_PATIENCE_S)
        found = await self.system.connect(self.coordinator, actor="coordinator", timeout=patience_s)
        coordinator = found.as_seen_by(self.stage)
        lost = self.actor.serve(coordinator)
        self.system.monitor(coordinator, watcher=self.stage)
        join = Join(
            slot=self.slot,
            rank=self.rank,
            stage=self.actor.stage,
            pid=os.getpid(),
            host=socket.gethostname(),
            machine=machine_id(),
            device=self.device.device,
            device_name=self.device.name,
            card=self.device.card,
            memory_bytes=self.device.memory_bytes,
            num_cores=find_cores().count,
            address=self.address,
            public_key=self.public_key,
        )
        await coordinator.ask(join, timeout=JOIN_TIMEOUT_S)
        log.info("joined the coordinator at %s", self.coordinator)
        return lost


async def patiently(attempt: Callable[[], Awaitable[T]], *, coordinator: str, search_s: float) -> T:
    """`attempt` again and again while there is no coordinator. Raises Timeout when there was none for `search_s` seconds."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + search_s
    while True:
        try:
            return await attempt()
        except (Timeout, Broken, Closed) as error:
            if loop.time() >= until_s:
                raise Timeout(f"no coordinator was found at {coordinator} for {search_s:g} s: {error}") from None
            log.info("no coordinator yet: %s", error)
        await asyncio.sleep(TRY_AGAIN_S)


async def listening_address(coordinator: str, *, name: str) -> str:
    """Where the other stages can reach a worker that reaches its coordinator at `coordinator`: by the same interface. Raises
    Timeout while there is no way to it, or its name is not known."""
    if not coordinator.startswith("tcp://"):
        return f"ipc://@asyncpipe-{name}"
    host, _, port = coordinator.removeprefix("tcp://").rpartition(":")
    return f"tcp://{await asyncio.to_thread(_address_towards, host.strip('[]'), int(port))}:0"


def ip_of(address: str) -> str:
    """Of the interface that a worker listens on; what only this machine can reach has the loopback's."""
    return address.removeprefix("tcp://").rpartition(":")[0].strip("[]") if address.startswith("tcp://") else "127.0.0.1"


def _address_towards(host: str, port: int) -> str:
    """This machine's own on the way to `host`: a datagram socket finds out without sending anything."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            found = str(probe.getsockname()[0])
    except OSError as error:
        raise Timeout(f"cannot reach {host}: {error.strerror or error}") from None
    return f"[{found}]" if ":" in found else found
