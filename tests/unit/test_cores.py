"""Which cores stages keep to, on machines of every build."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from asyncpipe import control_group, cores
from asyncpipe.cores import Cores, cpu_list, cpus_of_stages, find_cores, parse_cpu_list
from asyncpipe.errors import Invalid
from asyncpipe_coordinator import config
from asyncpipe_coordinator.config import ServiceConfig

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process keep to CPUs")


def machine(*sizes: int, threads_a_core: int = 1, quota: float | None = None) -> Cores:
    """Nodes of `sizes` cores, numbered through."""
    cpus = iter(range(sum(sizes) * threads_a_core))
    return Cores(tuple(tuple(tuple(next(cpus) for _ in range(threads_a_core)) for _ in range(size)) for size in sizes), quota)


def write_machine(root: Path, nodes: Sequence[str], siblings: Sequence[str]) -> Path:
    for number, cpus in enumerate(nodes):
        (root / f"node/node{number}").mkdir(parents=True)
        (root / f"node/node{number}/cpulist").write_text(f"{cpus}\n")
    for cpu, text in enumerate(siblings):
        (root / f"cpu/cpu{cpu}/topology").mkdir(parents=True)
        (root / f"cpu/cpu{cpu}/topology/thread_siblings_list").write_text(f"{text}\n")
    return root


@pytest.fixture
def _allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may use CPUs 0 to 7, but not 5."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3, 4, 6, 7}, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.usefixtures("_allowed")
def test_cores_and_nodes_are_those_that_may_be_used(tmp_path: Path) -> None:
    """Hyperthreads k and k + 4 share a core, as on many machines."""
    root = write_machine(tmp_path, ["0-1,4-5", "2-3,6-7"], [f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)])
    found = find_cores(root)
    assert found.nodes == (((0, 4), (1,)), ((2, 6), (3, 7)))
    assert Cores(found.nodes).count == 4


@pytest.mark.usefixtures("_allowed")
def test_a_kernel_that_says_nothing_has_a_core_a_cpu_in_one_node(tmp_path: Path) -> None:
    assert find_cores(tmp_path / "nothing").nodes == (((0,), (1,), (2,), (3,), (4,), (6,), (7,)),)


@pytest.mark.parametrize(("setting", "count"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("junk", 4)])
def test_a_control_groups_quota_limits_threads(
    setting: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "outer/cpu.max").write_text(setting)
    (tmp_path / "outer/inner/cpu.max").write_text("max 100000")
    (tmp_path / "own").write_text("3:cpu:/legacy\n0::/outer/inner\n")
    monkeypatch.setattr(control_group, "CGROUP", tmp_path)
    monkeypatch.setattr(control_group, "OWN_GROUP", tmp_path / "own")
    assert Cores(machine(4).nodes, cores._quota()).count == count


@linux_only
@pytest.mark.parametrize(
    ("pin", "nodes", "num_stages", "threads", "expected"),
    [
        ("auto", (4,), 2, 2, None),  # one node: the kernel knows best
        ("auto", (4, 4), 2, 4, ["0-3", "4-7"]),
        ("auto", (4, 4), 4, 2, ["0-3", "0-3", "4-7", "4-7"]),
        ("auto", (4, 4), 1, 8, ["0-7"]),
        ("auto", (4, 4), 3, 2, ["0-3", "0-3", "4-7"]),
        ("auto", (4, 4), 2, 5, None),  # too few cores for all
        ("off", (4, 4), 2, 4, None),
        ("cores", (4,), 2, 2, ["0-1", "2-3"]),
        ("cores", (4, 4), 3, 2, ["0-1", "2-3", "4-5"]),
        ("cores", (3, 3), 3, 2, ["0-1", "3-4", "2,5"]),  # the last one cannot but reach across
    ],
)
def test_stages_keep_to_cores(
    pin: str, nodes: tuple[int, ...], num_stages: int, threads: int, expected: list[str] | None
) -> None:
    found = cpus_of_stages(machine(*nodes), pin, num_stages=num_stages, threads=threads)
    assert (found and [cpu_list(cpus) for cpus in found]) == expected


@linux_only
def test_a_core_of_its_own_is_both_its_hyperthreads() -> None:
    assert cpus_of_stages(machine(2, threads_a_core=2), "cores", num_stages=2, threads=1) == [(0, 1), (2, 3)]


def test_too_few_cores_for_every_thread_are_refused() -> None:
    with pytest.raises(Invalid, match="3 stages of 2 threads need 6; this process may use 4"):
        cpus_of_stages(machine(4), "cores", num_stages=3, threads=2)
    with pytest.raises(Invalid, match="may use 3"):
        cpus_of_stages(machine(8, quota=3.5), "cores", num_stages=2, threads=2)


@pytest.mark.parametrize("text", ["0", "0-3", "0-3,8", "1,3,5-7"])
def test_lists_of_cpus_come_back_as_they_were(text: str) -> None:
    assert cpu_list(parse_cpu_list(text)) == text


@pytest.mark.parametrize(
    ("num_stages", "threads", "expected", "oversubscribes"),
    [(1, None, 4, False), (2, None, 2, False), (8, None, 1, False), (2, 2, 2, False), (2, 3, 3, True), (8, 1, 1, False)],
)
def test_stages_share_the_cores_out(
    num_stages: int, threads: int | None, expected: int, oversubscribes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More stages than cores take turns, which nobody is warned of: it is what was asked for."""
    monkeypatch.setattr(config, "find_cores", lambda: machine(4))
    stages = ServiceConfig(checkpoint=tmp_path, num_stages=num_stages, threads_per_stage=threads)
    assert (stages.threads, stages.oversubscribes) == (expected, oversubscribes)
