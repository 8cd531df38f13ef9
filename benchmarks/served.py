"""`asyncpipe-coordinator serve` in a process of its own, which ends with ours however that ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import NamedTuple

from asyncpipe import Client, connect
from asyncpipe.process.reap import PARENT_VARIABLE

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


class Served(NamedTuple):
    client: Client
    pid: int
    address: str  # tcp


@contextlib.asynccontextmanager
async def served(*options: str, quiet: bool = False) -> AsyncIterator[Served]:
    """With `quiet` its log is dropped."""
    command = [sys.executable, "-m", "asyncpipe_coordinator", "serve", "--bind", "tcp://127.0.0.1:0", "--json", *options]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL if quiet else None,
        env=os.environ | {PARENT_VARIABLE: str(os.getpid())},
    )
    try:
        assert process.stdout is not None
        address = json.loads(await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S))["address"]
        async with connect(address) as client:
            yield Served(client, process.pid, address)
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
