"""A coordinator and its workers as child processes of this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from asyncpipe.actors import Actor, ActorSystem
from asyncpipe.client.client import CONTROL_TIMEOUT_S, Client, connect
from asyncpipe.errors import AsyncPipeError, Broken, Invalid, Timeout, from_data
from asyncpipe.policy import Policy, policy_flags
from asyncpipe.process import ChildProcess
from asyncpipe.wire.messages import ServiceAnnouncement, ServiceFailed, ServiceReady

START_TIMEOUT_S = 600.0
KILL_AFTER_S = 15.0  # the coordinator stops its own workers first
USAGE_EXIT = 2


class _Announcements(Actor):
    """Where the coordinator process says that it is ready, or why not."""

    receives: ClassVar[Any] = ServiceAnnouncement

    def __init__(self, ready: asyncio.Future[str]) -> None:
        self._ready = ready

    async def handle(self, message: ServiceReady | ServiceFailed) -> None:
        if self._ready.done():
            return
        if isinstance(message, ServiceReady):
            self._ready.set_result(message.address)
        else:
            self._ready.set_exception(from_data(message.error))


@contextlib.asynccontextmanager
async def local(
    model: str | Path | None = None,
    *,
    stages: int = 1,
    split: Sequence[int] | None = None,
    micro_batches: int | None = None,
    max_sequences: int | None = None,
    max_step_tokens: int | None = None,
    kv_memory: str | int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    quantize: str | None = None,
    kv_dtype: str = "auto",
    model_impl: str = "auto",
    threads_per_stage: int | None = None,
    pin: str = "auto",
    policy: Policy | None = None,
    offload_dir: str | Path | None = None,
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    load_format: str | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> AsyncIterator[Client]:
    """Run `model` (a Hugging Face directory or hub name; None: the small bundled one) on this machine, cut into `stages`.

    The arguments are the flags of `asyncpipe-coordinator serve`; sizes are of each stage, like "2GiB", or bytes. `policy` says
    where weights, keys and values, and activations live; from `device_memory` and `host_memory` its percentages are derived.

    Yields a connected client; on exit every process is stopped and reaped. Raises Invalid for a bad model or argument,
    StageLost when a worker died at its start, Timeout when the start took longer than `start_timeout_s`.
    """
    options = {
        "stages": stages,
        "split": None if split is None else ",".join(map(str, split)),
        "micro-batches": micro_batches,
        "max-sequences": max_sequences,
        "max-step-tokens": max_step_tokens,
        "kv-memory": kv_memory,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "kv-dtype": kv_dtype,
        "model-impl": model_impl,
        "threads-per-stage": threads_per_stage,
        "pin": pin,
        "offload-dir": offload_dir,
        "device-memory": device_memory,
        "host-memory": host_memory,
        "load-format": load_format,
    }
    flags = [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]
    flags += policy_flags(policy) if policy is not None else []
    token = secrets.token_hex(16)
    async with ActorSystem("launcher", role="launcher", token=token) as system:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        system.spawn(lambda: _Announcements(ready), name="announcements")
        announce = await system.listen(f"ipc://@asyncpipe-{secrets.token_hex(8)}")
        bind = f"ipc://@asyncpipe-{secrets.token_hex(16)}"
        process = await ChildProcess.spawn(
            [sys.executable, "-m", "asyncpipe_coordinator", "serve", "--bind", bind, "--announce", announce]
            + flags
            + ([] if model is None else [str(model)]),
            env=os.environ | {"ASYNCPIPE_TOKEN": token},
            name="coordinator",
        )
        try:
            address = await _until_ready(process, ready, timeout_s=start_timeout_s)
            async with connect(address, timeout_s=CONTROL_TIMEOUT_S) as client:
                yield client
        finally:
            await process.stop(kill_after_s=KILL_AFTER_S)


async def _until_ready(process: ChildProcess, ready: asyncio.Future[str], *, timeout_s: float) -> str:
    """The service's address. Raises what it said was wrong, or how its process ended."""
    async with asyncio.TaskGroup() as group:
        exited = group.create_task(process.wait())
        either: set[asyncio.Future[Any]] = {exited, ready}
        try:
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            exited.cancel()
    if ready.done():
        return ready.result()
    if process.returncode is None:
        raise Timeout(f"the coordinator (pid {process.pid}) was not ready within {timeout_s:g} s")
    raise _exit_error(process)


def _exit_error(process: ChildProcess) -> AsyncPipeError:
    lines = process.stderr_tail()
    if process.returncode == USAGE_EXIT and lines:
        return Invalid(lines[-1].removeprefix("asyncpipe-coordinator: error: "))
    return Broken(f"the coordinator (pid {process.pid}) {process.describe_exit()}: " + "\n  ".join(lines))
