"""What torchrun, Slurm and Open MPI tell the processes that they start, by their environment: which of them this is, and where
the first one runs, beside which the coordinator is looked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from asyncpipe.errors import Invalid

DEFAULT_PORT = 5550
PORT_VARIABLE = "ASYNCPIPE_PORT"


@dataclass(frozen=True, slots=True)
class Place:
    """Of this process in its launcher's job; all None without a launcher."""

    rank: int | None = None
    local_rank: int | None = None  # among those on the same machine
    head: str | None = None  # the machine of rank 0


def find_place(env: Mapping[str, str]) -> Place:
    """torchrun comes first: it may itself have been started by one of the others. Raises Invalid for a rank that is none."""
    if "RANK" in env:
        return Place(_number(env, "RANK"), _number(env, "LOCAL_RANK"), env.get("MASTER_ADDR"))
    if "OMPI_COMM_WORLD_RANK" in env:
        rank, local_rank = _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
        return Place(rank, local_rank, _open_mpi_head(env))
    if "SLURM_PROCID" in env:
        return Place(_number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID"), _slurm_head(env))
    return Place()


def coordinator_address(place: Place, env: Mapping[str, str]) -> str | None:
    """Of the coordinator that runs on the job's first machine; None when it is not known which that is."""
    return f"tcp://{place.head}:{env.get(PORT_VARIABLE, DEFAULT_PORT)}" if place.head else None


def device_of(device: str, place: Place, env: Mapping[str, str]) -> str:
    """`cuda` without a number is the card of the local rank, among those that the process may see: where the launcher gives
    each one a card of its own, that is the first."""
    if device != "cuda":
        return device
    local_rank, visible = place.local_rank or 0, env.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{local_rank % len(visible.split(',')) if visible else local_rank}"


def first_host(hosts: str) -> str:
    """Of a list in Slurm's notation: "gpu[07-09,12],login1" begins with gpu07."""
    first = re.match(r"[^,\[]+(\[[^\]]*\])?", hosts)
    name, _, numbers = (first[0] if first else "").partition("[")
    return name + re.split(r"[-,\]]", numbers)[0]


def _slurm_head(env: Mapping[str, str]) -> str | None:
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    return first_host(hosts) if hosts else env.get("SLURM_LAUNCH_NODE_IPADDR")


def _open_mpi_head(env: Mapping[str, str]) -> str | None:
    """mpirun's own machine, where rank 0 is unless it was told otherwise. Open MPI 4 tells its addresses:
    "1234.0;tcp://10.0.0.1,10.1.0.1:4567"; 5 tells only its name, within that of the job: "prterun-gpu1-4567@1"."""
    address = re.search(r"tcp://([^,:;/]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    name = re.match(r"prte(?:run)?-(.+)-\d+@", env.get("PMIX_NAMESPACE", ""))
    found = address or name
    return found[1] if found else None


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise Invalid(f"{name}={text}: a rank is a number; was it set by a launcher?")
    return int(text)
