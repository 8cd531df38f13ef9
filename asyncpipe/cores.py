"""Which processor cores stages compute on: the ones that this process may use, none twice, and each stage's near each other."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncpipe.control_group import group_settings
from asyncpipe.errors import Invalid

SYSTEM = Path("/sys/devices/system")
PIN_MODES = ("auto", "cores", "off")


@dataclass(frozen=True, slots=True)
class Cores:
    """What this process may use: CPUs as the kernel numbers them, by core and by NUMA node."""

    nodes: tuple[tuple[tuple[int, ...], ...], ...]  # of each node its cores, of each core its CPUs (two with hyperthreading)
    quota: float | None = None  # cores' worth of time that the control group allows; None: no limit

    @property
    def count(self) -> int:
        """Threads that compute at full speed: one a core, and no more than the quota pays for."""
        cores = sum(map(len, self.nodes))
        return cores if self.quota is None else max(min(cores, int(self.quota)), 1)


@functools.cache
def find_cores(system: Path = SYSTEM) -> Cores:
    """Of this process. Where the kernel says nothing of cores or nodes, every CPU is a core and all are in one node."""
    cpus = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else range(os.cpu_count() or 1)
    cores: dict[tuple[int, ...], None] = {}
    for cpu in cpus:
        siblings = _read_cpus(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") or (cpu,)
        cores[tuple(sibling for sibling in siblings if sibling in cpus)] = None
    paths = sorted((system / "node").glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name.removeprefix("node")))
    members = [set(_read_cpus(path)) for path in paths]
    nodes = [tuple(core for core in cores if core[0] in node) for node in members]
    if sum(map(len, nodes)) != len(cores):
        nodes = [tuple(cores)]
    return Cores(tuple(node for node in nodes if node), _quota())


def cpus_of_stages(cores: Cores, pin: str, *, num_stages: int, threads: int) -> list[tuple[int, ...]] | None:
    """The CPUs that each of the stages is to run on; None: wherever the kernel puts it.

    `auto` keeps each stage to the NUMA nodes that its threads fit in, where there are several; `cores` gives every thread a
    core of its own. Raises Invalid where there are too few cores for that.
    """
    if pin == "off" or (pin == "auto" and len(cores.nodes) == 1):
        return None
    enough = num_stages * threads <= cores.count
    if not enough or sys.platform != "linux":
        if pin == "auto":
            return None
        reason = f"{num_stages} stages of {threads} threads need {num_stages * threads}; this process may use {cores.count}"
        raise Invalid(f"--pin cores: {reason if not enough else 'only on Linux'}")
    free = [list(node) for node in cores.nodes]
    stages = []
    for _ in range(num_stages):
        taken = _take(free, threads)
        if pin == "auto":
            taken = {node: cores.nodes[node] for node in taken}
        stages.append(tuple(sorted(cpu for part in taken.values() for core in part for cpu in core)))
    return stages


def _take(free: list[list[tuple[int, ...]]], count: int) -> dict[int, Sequence[tuple[int, ...]]]:
    """`count` cores, by node: of the node with the fewest that are enough, or of as few nodes as will do."""
    taken: dict[int, Sequence[tuple[int, ...]]] = {}
    while count:
        by_size = sorted(range(len(free)), key=lambda node: len(free[node]))
        node = next((node for node in by_size if len(free[node]) >= count), by_size[-1])
        taken[node], free[node] = free[node][:count], free[node][count:]
        count -= len(taken[node])
    return taken


def cpu_list(cpus: Iterable[int]) -> str:
    """As the kernel writes it: 0-3,8."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{first}-{last}" if first != last else f"{first}" for first, last in ranges)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The CPUs of a list like 0-3,8. Raises ValueError."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)


def _read_cpus(path: Path) -> tuple[int, ...]:
    try:
        return parse_cpu_list(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ()


def _quota() -> float | None:
    """The smallest of this control group and of those around it."""
    quotas = []
    for (setting,) in group_settings("cpu.max"):
        quota, _, period = setting.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)
