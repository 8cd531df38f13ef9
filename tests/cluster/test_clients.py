"""Clients that vanish, freeze, or do not read what they asked for: they are cut off, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest

from asyncpipe import Broken, Client, Invalid, Refused, connect
from asyncpipe.actors import Actor, ActorSystem
from asyncpipe.errors import to_data
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe.process import ChildProcess
from asyncpipe.transport.base import LinkOptions
from asyncpipe.wire.messages import Generate, Join, Sampling, StageFailed, Status, Tokens, Updates
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from asyncpipe_coordinator.shell import clients
from asyncpipe_workers.sim import simulated_tokens
from tests.clusters import until
from tests.support import run

PROMPT = [5, 6, 7]
FOREVER = 100_000
CLIENT = """
import asyncio, sys, asyncpipe

async def main():
    async with asyncpipe.connect(sys.argv[1]) as client:
        async for piece in client.stream([8, 9], max_new_tokens=100000, ignore_eos=True):
            if piece.index == 5:
                print("streaming", flush=True)

asyncio.run(main())
"""


CONFIG = ServiceConfig(checkpoint=BUNDLED_MODEL, num_stages=2, device="sim:layer_ms=1,context=200000,kv_blocks=100000")


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, Client]]:
    async with Service.open(CONFIG, bind="tcp://127.0.0.1:0") as service, connect(service.address) as client:
        yield service.address, client


async def until_open(client: Client, count: int, *, timeout_s: float) -> None:
    await until(client, lambda status: num_open(status) == count, timeout_s=timeout_s)


def num_open(status: Status) -> int:
    return status.requests_running + status.requests_waiting


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["vanishes", "freezes"])
def test_a_clients_requests_end_with_it_and_others_go_on(number: signal.Signals) -> None:
    async def scenario() -> None:
        async with serving() as (address, client):
            argv = [sys.executable, "-c", CLIENT, address]
            other = await ChildProcess.spawn(argv, name="client", stdout=asyncio.subprocess.PIPE)
            try:
                async with asyncio.timeout(20):
                    assert await other.output.readline() == b"streaming\n"
                mine = asyncio.ensure_future(client.generate(PROMPT, max_new_tokens=600))
                await until_open(client, 2, timeout_s=5)
                os.kill(other.pid, number)
                # It is noticed after two seconds, later where this machine is busy: the other may have ended by then too.
                await until(client, lambda status: num_open(status) < 2, timeout_s=15)
                assert list((await mine).token_ids) == simulated_tokens(PROMPT, 600)
                await until_open(client, 0, timeout_s=15)
                # Whoever ends in the middle of several steps keeps its blocks until they are over.
                await until(client, lambda status: status.kv.used_blocks == 0, timeout_s=5)
            finally:
                await other.stop()

    run(scenario(), timeout_s=60)


class Sleeper(Actor):
    """Takes one message and never comes back for the next."""

    receives: ClassVar[Any] = Updates
    mailbox_capacity: ClassVar[int] = 2

    async def handle(self, message: Updates) -> None:
        await asyncio.sleep(3600)


def test_a_client_that_reads_nothing_is_cut_off_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives, and its link beats; only its messages pile up, and no more of them than its window and an outbox hold."""
    monkeypatch.setattr(clients, "STALL_S", 1.0)

    async def scenario() -> None:
        async with (
            serving() as (address, client),
            ActorSystem("sleepy", role="client", options=LinkOptions(window=4)) as system,
        ):
            coordinator = await system.connect(address, actor="coordinator")
            sleeper = system.spawn(Sleeper, name="inbox")
            request = Generate(request_id="x", prompt_token_ids=(8, 9), sampling=Sampling(max_new_tokens=FOREVER))
            await coordinator.as_seen_by(sleeper).ask(request, timeout=5.0)
            mine = asyncio.ensure_future(client.generate(PROMPT, max_new_tokens=600))
            await until_open(client, 2, timeout_s=5)
            await until_open(client, 1, timeout_s=10)
            assert list((await mine).token_ids) == simulated_tokens(PROMPT, 600)

    run(scenario(), timeout_s=60)


def test_a_text_that_takes_seconds_to_tokenize_delays_nobody() -> None:
    """Before, the coordinator did nothing else meanwhile, and its workers took it for dead."""

    async def scenario() -> None:
        async with serving() as (_, client):
            num_pieces = 0

            async def stream() -> list[int]:
                nonlocal num_pieces
                token_ids = []
                async for piece in client.stream(PROMPT, max_new_tokens=2000, ignore_eos=True):
                    num_pieces += 1
                    token_ids.append(piece.token_id)
                return token_ids

            mine = asyncio.ensure_future(stream())
            await until_open(client, 1, timeout_s=5)
            before = num_pieces
            with pytest.raises(Invalid, match=r"the prompt has 500\d\d\d tokens; the model's context is 200000"):
                await client.generate("class Stack:\n    " * 100_000)
            assert num_pieces - before > 20
            assert await mine == simulated_tokens(PROMPT, 2000)
            assert (await client.status()).restarts == 0

    run(scenario(), timeout_s=60)


def test_a_client_cannot_join_as_a_worker_nor_speak_for_one() -> None:
    async def scenario() -> None:
        async with (
            Service.open(CONFIG, bind="tcp://127.0.0.1:0") as service,
            connect(service.address) as client,
            ActorSystem("impostor", role="client") as system,
        ):
            epoch = service._pool.epoch
            coordinator = await system.connect(service.address, actor="coordinator")
            impostor = coordinator.as_seen_by(system.spawn(Sleeper, name="impostor"))
            with pytest.raises(Refused, match="a client cannot join"):
                await impostor.ask(Join(pid=1, host="h", device="cpu", address=service.address), timeout=5.0)
            token_ids = []
            async for piece in client.stream(PROMPT, max_new_tokens=200):
                token_ids.append(piece.token_id)
                impostor.signal(StageFailed(epoch=epoch, stage=0, error=to_data(Broken("not true"))))
                impostor.signal(Tokens(epoch=epoch, micro_batch=0, step=piece.index + 1, token_ids=(99,)))
            assert token_ids == simulated_tokens(PROMPT, 200)
            assert (await client.status()).restarts == 0

    run(scenario(), timeout_s=60)
