"""The `serve` command: a coordinator that clients connect to."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import msgspec

from asyncpipe.actors import ActorSystem
from asyncpipe.errors import AsyncPipeError, to_data
from asyncpipe.transport.keys import load_keys
from asyncpipe.wire.messages import Message, ServiceFailed, ServiceReady
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Security, Service
from asyncpipe_coordinator.shell.workers import OnProgress, say_nothing

ANNOUNCE_TIMEOUT_S = 10.0


async def serve(arguments: argparse.Namespace, config: ServiceConfig) -> int:
    """Serve until stopped (SIGINT, SIGTERM), or until the pipeline is lost for good."""
    try:
        keys = load_keys(Path(arguments.keys) if arguments.keys else None, role="coordinator")
        security = Security(keys=keys, insecure=arguments.insecure)
        async with Service.open(
            config, bind=arguments.bind, security=security, on_progress=_show(arguments, config)
        ) as service:
            await _announce(arguments.announce, ServiceReady(address=service.address))
            _say_ready(service, as_json=arguments.json, quiet=bool(arguments.announce))
            await service.run()
    except AsyncPipeError as error:
        with contextlib.suppress(AsyncPipeError):
            await _announce(arguments.announce, ServiceFailed(error=to_data(error)))
        raise
    return 0


def _show(arguments: argparse.Namespace, config: ServiceConfig) -> OnProgress:
    """Who joins from elsewhere is shown as it comes; local starts are quick, and silent."""
    if config.workers_are_local or arguments.announce:
        return say_nothing

    def show(what: str, *, steps: int = 1) -> None:
        print(what, file=sys.stderr, flush=True)

    return show


def _say_ready(service: Service, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        ready = {"address": service.address, "model": str(service.config.checkpoint), "stages": service.config.num_stages}
        print(msgspec.json.encode(ready).decode(), flush=True)
    elif not quiet:
        print(
            f"serving {service.config.checkpoint.name} on {service.config.num_stages} stages at {service.address}\n"
            f'connect: asyncpipe.connect("{service.address}")   stop: Ctrl-C',
            file=sys.stderr,
            flush=True,
        )


async def _announce(launcher: str | None, message: Message) -> None:
    """Tell the process that launched us (`asyncpipe.local`) how the start went."""
    if launcher is None:
        return
    token = os.environ.get("ASYNCPIPE_TOKEN", "")
    async with ActorSystem("announcer", role="coordinator", token=token) as system:
        ref = await system.connect(launcher, actor="announcements", timeout=ANNOUNCE_TIMEOUT_S)
        await ref.tell(message, timeout=ANNOUNCE_TIMEOUT_S)
