"""What links leave behind when they close: no descriptor, no shared memory, and nothing that was sent is lost."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace

import pytest

from tests.contract.transport_peers import (
    OPTIONS,
    SERVER,
    Recorder,
    connect,
    free_name,
    joined,
    listen,
    num_open_files,
)
from tests.support import run, until


@pytest.mark.parametrize("scheme", ["memory", "inproc", "ipc", "tcp"])
def test_nothing_is_left_open_after_many_links(scheme: str) -> None:
    async def use_one_link() -> None:
        address = "tcp://127.0.0.1:0" if scheme == "tcp" else f"{scheme}://{'@' * (scheme == 'ipc')}{free_name()}"
        async with joined(address) as pair:
            for _ in range(3):
                await pair.ours.send([bytes(1 << 20)], timeout_s=5)
                await pair.theirs.send([bytes(1 << 20)], timeout_s=5)
            await pair.our_receiver.has(3)
            await pair.their_receiver.has(3)

    async def scenario() -> None:
        await use_one_link()
        num_fds, shm_files = num_open_files(), named_shared_memory()
        for _ in range(5):
            await use_one_link()
        await until(lambda: num_open_files() <= num_fds)  # ZeroMQ closes in the background
        assert named_shared_memory() <= shm_files

    run(scenario())


@pytest.mark.parametrize("reason", ["refused", "nobody there"])
def test_a_failed_connection_leaves_nothing_open(reason: str) -> None:
    async def scenario() -> None:
        listener, _ = await listen("tcp://127.0.0.1:0", hello=replace(SERVER, token=SERVER.node))
        address = listener.address if reason == "refused" else f"ipc://@{free_name()}"

        async def fail() -> None:
            with pytest.raises(Exception, match=r"refused|nobody"):
                await connect(address, options=replace(OPTIONS, handshake_s=0.2))

        await fail()
        num_fds = num_open_files()
        for _ in range(3):
            await fail()
        await until(lambda: num_open_files() <= num_fds)
        await listener.close()

    run(scenario())


def test_what_was_sent_before_closing_arrives_though_the_process_ends() -> None:
    script = """
import asyncio, sys
from tests.contract.transport_peers import connect, OPTIONS
from dataclasses import replace
async def main():
    link = await connect(sys.argv[1], options=replace(OPTIONS, shared_memory=False, handshake_s=20))
    await link.send([bytes(64_000_000)], timeout_s=5)
    await link.close()
asyncio.run(main())
"""

    async def scenario() -> None:
        listener, accepted = await listen(f"ipc://@{free_name()}")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, listener.address)
        await until(lambda: accepted, timeout_s=15)
        accepted[0].start(receiver := Recorder())
        await until(lambda: receiver.deliveries, timeout_s=15)
        assert len(receiver.deliveries[0].frames[0]) == 64_000_000
        assert await process.wait() == 0
        await listener.close()

    run(scenario(), timeout_s=40)


def named_shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))
