"""Hostile peers at the ports of a running pipeline: the coordinator's, and each worker's own."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from asyncpipe import Refused, Timeout, connect
from asyncpipe.process import ChildProcess
from asyncpipe.transport.base import LinkOptions
from asyncpipe.transport.keys import KeyPair, Keys, load_keys
from asyncpipe_coordinator.cli import main as coordinator_main
from tests.checkpoints import make_opt
from tests.clusters import NUM_TOKENS, Cluster, cluster, stream, undisturbed_stream, until
from tests.contract import transport_peers
from tests.contract.curve_peers import CURVE_GREETING, CURVE_OPTIONS, GARBAGE, say_raw, tapped
from tests.contract.transport_peers import CLIENT
from tests.support import run

ATTEMPTS = 2
WORKER_HELLO = replace(CLIENT, role="worker")
CLIENT_HELLO = replace(CLIENT, role="client")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"), max_positions=512)


def test_a_worker_or_client_whose_key_nobody_knows_is_refused(checkpoint: Path, keys: Path, tmp_path: Path) -> None:
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
                assert len(await stream(client)) == NUM_TOKENS

    run(scenario(), timeout_s=60)


def test_garbage_replays_and_strangers_at_every_port_are_refused_logged_once_and_disturb_nobody(
    checkpoint: Path, keys: Path
) -> None:
    expected = undisturbed_stream(checkpoint)

    async def scenario() -> None:
        async with cluster(checkpoint, keys) as machines:
            coordinator = await machines.coordinator("--stages", "2")
            workers = [await machines.worker() for _ in range(2)]
            async with machines.client() as client:
                before = await until(client, lambda status: status.state == "running")
                attacks = asyncio.gather(
                    attack_coordinator(machines, keys), *(attack_stage(worker, keys) for worker in workers)
                )
                while not attacks.done():
                    assert await stream(client) == expected
                await attacks
                assert await stream(client) == expected
                after = await client.status()
                assert (after.restarts, after.requests_failed, after.state) == (0, 0, "running")
                assert [stage.pid for stage in after.stages] == [stage.pid for stage in before.stages]
            for process in (coordinator, *workers):
                assert refusals(process), f"{process.name} says nothing of strangers"
                assert max(Counter(refusals(process)).values()) == 1
        secrets = [load(keys, role).own.secret for role in ("coordinator", "worker", "client")]
        said = [line for process in (coordinator, *workers) for line in process.stderr_tail()]
        assert not [line for line in said if any(secret in line for secret in secrets)]

    run(scenario(), timeout_s=120)


async def attack_coordinator(machines: Cluster, keys: Path) -> None:
    client = options_of(load(keys, "client").own, server_key=load(keys, "coordinator").own.public)
    await attack(machines.address)
    await replay(machines.address, hello=CLIENT_HELLO, options=client)
    with pytest.raises(Refused, match="this key is not allowed to be a 'worker'"):
        await transport_peers.connect(machines.address, hello=WORKER_HELLO, options=client)


async def attack_stage(worker: ChildProcess, keys: Path) -> None:
    """A stage lets in the stage before it in the ring, and nobody else: not even a client."""
    address = f"tcp://127.0.0.1:{listening_port(worker.pid)}"
    server_key = load(keys, "worker").own.public
    await attack(address)
    for key in (load(keys, "client").own, KeyPair.new()):
        with pytest.raises(Refused, match="it is not allowed there"):
            await transport_peers.connect(address, hello=CLIENT_HELLO, options=options_of(key, server_key=server_key))
    with pytest.raises(Refused, match="takes only peers with keys"):
        await transport_peers.connect(address, options=CURVE_OPTIONS)
    await replay(address, hello=WORKER_HELLO, options=options_of(load(keys, "worker").own, server_key=server_key))


async def attack(address: str) -> None:
    """All that needs no key, at once."""
    for _ in range(ATTEMPTS):
        leaving = (say_raw(address, CURVE_GREETING, and_leave=True) for _ in range(10))
        await asyncio.gather(*(say_raw(address, garbage) for garbage in GARBAGE.values()), *leaving)


async def replay(address: str, *, hello: transport_peers.Hello, options: LinkOptions) -> None:
    """What somebody said who was let in."""
    async with tapped(address) as recording:
        link = await transport_peers.connect(recording.address, hello=hello, options=options)
        await link.send([b"once is enough"], timeout_s=5)
        await link.close()
    for _ in range(ATTEMPTS):
        await say_raw(address, bytes(recording.sent))


def options_of(own: KeyPair, *, server_key: str) -> LinkOptions:
    return replace(CURVE_OPTIONS, keys=Keys(own), server_key=server_key)


def load(directory: Path, role: str) -> Keys:
    keys = load_keys(directory, role=role, env={})
    assert keys is not None
    return keys


def refusals(process: ChildProcess) -> list[str]:
    return [line.partition("refused a peer")[2] for line in process.stderr_tail() if "refused a peer" in line]


def listening_port(pid: int) -> int:
    """The one tcp port that a process listens on."""
    sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (address,) = {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}
    return int(address.rpartition(":")[2], 16)
