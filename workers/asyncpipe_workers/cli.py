"""`asyncpipe-worker`: one stage of a pipeline, in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Sequence

from asyncpipe.actors import ActorSystem
from asyncpipe.cores import cpu_list, parse_cpu_list
from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.process import die_with_parent, run
from asyncpipe.simulation import Simulation, is_simulation
from asyncpipe.transport.base import LinkOptions
from asyncpipe.wire.messages import Join
from asyncpipe_workers.loading import load_stage_compute
from asyncpipe_workers.stage import STAGE_ACTOR, StageActor

JOIN_TIMEOUT_S = 10.0
STEP_WINDOW = 2048  # steps under way to this stage; there are never more than micro-batches
EXIT_FAILURE = 1
EXIT_USAGE = 2

EPILOG = """examples:
  asyncpipe-worker --coordinator ipc://@asyncpipe-1234 --device cpu

Usually nobody types this: asyncpipe-coordinator starts the workers of this machine by itself.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncpipe-worker",
        description="Compute one stage of a pipeline for an asyncpipe coordinator.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    env = os.environ
    parser.add_argument(
        "--coordinator",
        metavar="ADDRESS",
        default=env.get("ASYNCPIPE_COORDINATOR"),
        help="where the coordinator listens for workers (ASYNCPIPE_COORDINATOR)",
    )
    parser.add_argument(
        "--device",
        default=env.get("ASYNCPIPE_DEVICE", "cpu"),
        help="cpu, cuda:N, or sim:layer_ms=10,… for a stage that only takes time (ASYNCPIPE_DEVICE; default: cpu)",
    )
    parser.add_argument(
        "--slot",
        type=int,
        default=env.get("ASYNCPIPE_SLOT", "0"),
        help="which of the coordinator's workers this is (ASYNCPIPE_SLOT; default: 0)",
    )
    parser.add_argument(
        "--cpus",
        metavar="LIST",
        default=env.get("ASYNCPIPE_CPUS"),
        help="keep to these, like 0-3,8 (ASYNCPIPE_CPUS; default: any)",
    )
    parser.add_argument(
        "--log-level",
        default=env.get("ASYNCPIPE_LOG_LEVEL", "warning"),
        choices=["debug", "info", "warning", "error"],
        help="ASYNCPIPE_LOG_LEVEL; default: warning",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `asyncpipe-worker`; returns the exit status."""
    die_with_parent()
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        check_arguments(arguments)
        keep_to_cpus(arguments.cpus)
        return run(functools.partial(work, arguments))
    except Invalid as error:
        print(f"asyncpipe-worker: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except AsyncPipeError as error:
        print(f"asyncpipe-worker: {error}", file=sys.stderr)
        return EXIT_FAILURE


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises Invalid for what can be known to be wrong before anything starts."""
    if not arguments.coordinator:
        raise Invalid("--coordinator ADDRESS is needed (asyncpipe-coordinator serve prints it)")
    if is_simulation(arguments.device):
        Simulation.parse(arguments.device)
        return
    if arguments.device != "cpu" and not arguments.device.startswith("cuda"):
        raise Invalid(f"--device {arguments.device}: use cpu, cuda:N or sim:layer_ms=10")
    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise Invalid(f"a worker needs {package}, which is not installed: pip install 'asyncpipe-runtime[worker]'")


def keep_to_cpus(cpus: str | None) -> None:
    """Before any thread is started and any memory is touched, so that both are where these CPUs are. Raises Invalid."""
    if cpus is None:
        return
    try:
        os.sched_setaffinity(0, parse_cpu_list(cpus))
    except (ValueError, OverflowError):
        raise Invalid(f"--cpus {cpus}: give a list like 0-3,8") from None
    except OSError as error:
        raise Invalid(f"--cpus {cpus}: {error.strerror}; this process may use {cpu_list(os.sched_getaffinity(0))}") from None
    except AttributeError:
        raise Invalid("--cpus works on Linux only") from None


async def work(arguments: argparse.Namespace) -> int:
    """Join the coordinator and serve until it stops or is gone."""
    token = os.environ.get("ASYNCPIPE_TOKEN", "")
    coordinator_lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with ActorSystem("worker", role="worker", token=token, options=LinkOptions(window=STEP_WINDOW)) as system:
        coordinator = await system.connect(arguments.coordinator, actor="coordinator", timeout=JOIN_TIMEOUT_S)
        loader = functools.partial(load_stage_compute, device=arguments.device)
        stage = system.spawn(
            lambda: StageActor(coordinator=coordinator, loader=loader, lost=coordinator_lost), name=STAGE_ACTOR
        )
        address = await system.listen(f"ipc://@asyncpipe-{system.node}")
        join = Join(
            slot=arguments.slot,
            pid=os.getpid(),
            host=socket.gethostname(),
            device=arguments.device,
            address=address,
        )
        await coordinator.as_seen_by(stage).ask(join, timeout=JOIN_TIMEOUT_S)
        # No deadline: serving ends when the coordinator is lost (its link has one) or this process is told to stop.
        await coordinator_lost
    return 0
