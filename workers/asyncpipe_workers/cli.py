"""`asyncpipe-worker`: one stage of a pipeline, in a process of its own."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncpipe.actors import ActorSystem
from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.machine import machine_id
from asyncpipe.process import die_with_parent, exit_on_term, run
from asyncpipe.simulation import Simulation, is_simulation
from asyncpipe.transport.base import LinkOptions
from asyncpipe.transport.keys import Keys, load_keys
from asyncpipe_workers.affinity import keep_to_cpus
from asyncpipe_workers.c_runtime import prepare_c_runtime
from asyncpipe_workers.device import DeviceFacts, look_at
from asyncpipe_workers.hidden_links import StageSeat
from asyncpipe_workers.launcher import coordinator_address, device_of, find_place
from asyncpipe_workers.loading import load_stage_compute
from asyncpipe_workers.membership import Membership, ip_of, listening_address, patiently
from asyncpipe_workers.stage import STAGE_ACTOR, StageActor

STEP_WINDOW = 2048  # steps under way to this stage; there are never more than micro-batches
EXIT_FAILURE = 1
EXIT_USAGE = 2

EPILOG = """examples:
  asyncpipe-worker --coordinator tcp://10.0.0.1:5550 --device cuda:0
  asyncpipe-worker --coordinator tcp://10.0.0.1:5550 --device cpu --keys asyncpipe-keys
  torchrun --nnodes 2 --nproc-per-node 4 ... --no-python asyncpipe-worker --device cuda
  srun --ntasks-per-node 4 asyncpipe-worker --coordinator tcp://head:5550 --device cuda
  mpirun -n 8 asyncpipe-worker --coordinator tcp://head:5550 --device cuda

Under torchrun, Slurm and Open MPI, stage K is rank K where it can be, --device cuda is the card of the local rank, and without
--coordinator it is looked for on rank 0's machine, at port 5550 (ASYNCPIPE_PORT).

The workers of its own machine asyncpipe-coordinator starts by itself, unless it is told --workers external.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncpipe-worker",
        description="Compute one stage of a pipeline for an asyncpipe coordinator.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def option(flag: str, help: str, **settings: Any) -> None:
        variable = "ASYNCPIPE_" + flag.lstrip("-").replace("-", "_").upper()
        settings["default"] = os.environ.get(variable, settings.get("default"))
        parser.add_argument(flag, help=f"{help} [{variable}]", **settings)

    option("--coordinator", "where the coordinator listens; it may come later", metavar="ADDRESS")
    option("--device", "cpu, cuda:N, cuda, or sim:layer_ms=10,… which only takes time (default: cpu)", default="cpu")
    option("--keys", "the directory with this worker's key and the coordinator's (default: no keys)", metavar="DIR")
    option("--listen", "where the stage before finds this one, tcp://IP:PORT (default: a free port towards the coordinator)")
    option("--model", "where the model is on this machine (default: where it is for the coordinator)", metavar="DIR")
    option("--rank", "the stage to be, if it is free (default: the launcher's rank)", type=int, metavar="K")
    option("--search", "give up after so many seconds without a coordinator (default: 3600)", type=float, default=3600.0)
    option("--cpus", "keep to these, like 0-3,8 (default: any)", metavar="LIST", default="")
    option("--log-level", "default: warning", default="warning", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--insecure", action="store_true", help="listen without keys where other machines can reach this one")
    parser.add_argument("--slot", type=int, help=argparse.SUPPRESS)  # for workers that a coordinator starts
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `asyncpipe-worker`; returns the exit status."""
    prepare_c_runtime()
    die_with_parent()
    exit_on_term()
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        fill_in(arguments, os.environ)
        check_arguments(arguments)
        keep_to_cpus(arguments.cpus)
        keys = load_keys(Path(arguments.keys) if arguments.keys else None, role="worker") if arguments.slot is None else None
        device = look_at(arguments.device)
        return run(lambda: work(arguments, keys, device))
    except Invalid as error:
        print(f"asyncpipe-worker: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except AsyncPipeError as error:
        print(f"asyncpipe-worker: {error}", file=sys.stderr)
        return EXIT_FAILURE


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises Invalid for what can be known to be wrong before anything starts."""
    if not arguments.coordinator:
        raise Invalid("--coordinator ADDRESS is needed (asyncpipe-coordinator serve --workers external prints it)")
    if arguments.search < 0:
        raise Invalid(f"--search {arguments.search:g}: give seconds, 0 or more")
    if arguments.model is not None and not Path(arguments.model).is_dir():
        raise Invalid(f"--model {arguments.model}: there is no such directory")
    if is_simulation(arguments.device):
        Simulation.parse(arguments.device)
        return
    if arguments.device != "cpu" and not arguments.device.startswith("cuda"):
        raise Invalid(f"--device {arguments.device}: use cpu, cuda:N or sim:layer_ms=10")
    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise Invalid(f"a worker needs {package}, which is not installed: pip install 'asyncpipe-runtime[worker]'")


def fill_in(arguments: argparse.Namespace, env: Mapping[str, str]) -> None:
    """What the command line leaves open, from the launcher's environment. Raises Invalid."""
    place = find_place(env)
    arguments.coordinator = arguments.coordinator or coordinator_address(place, env)
    arguments.rank = place.rank if arguments.rank is None else arguments.rank
    arguments.device = device_of(arguments.device, place, env)


async def work(arguments: argparse.Namespace, keys: Keys | None, device: DeviceFacts) -> int:
    """Join the coordinator and serve it: one that started us until it is gone, others as often as they come back."""
    token = os.environ.get("ASYNCPIPE_TOKEN", "")
    options = LinkOptions(window=STEP_WINDOW, keys=keys, insecure=arguments.insecure)
    search = {"coordinator": arguments.coordinator, "search_s": arguments.search}
    async with ActorSystem("worker", role="worker", token=token, options=options) as system:
        loader = functools.partial(load_stage_compute, device=arguments.device, model=arguments.model)
        listen = arguments.listen or await patiently(
            lambda: listening_address(arguments.coordinator, name=system.node), **search
        )
        seat = StageSeat(machine=machine_id(), device=device.device, card=device.card, ip=ip_of(listen))
        actor = StageActor(loader=loader, seat=seat, admit=functools.partial(admit_only, keys))
        stage = system.spawn(lambda: actor, name=STAGE_ACTOR)
        membership = Membership(
            system=system,
            actor=actor,
            stage=stage,
            address=await system.listen(listen),
            public_key=keys.own.public if keys is not None else "",
            device=device,
            slot=arguments.slot,
            rank=arguments.rank,
            **search,
        )
        if arguments.slot is None:
            await membership.serve()
        else:
            await membership.serve_once()
    return 0


def admit_only(keys: Keys | None, public_key: str) -> None:
    """Let the stage before connect, whose key the coordinator knows, and none that was there before it."""
    if keys is not None:
        for other in set(keys.allowed) - {public_key}:
            keys.disallow(other)
        if public_key:
            keys.allow(public_key, "worker")
