"""Workers that torchrun, Open MPI and Slurm start find the coordinator, and become the stages of their ranks."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_opt
from tests.clusters import Cluster, cluster, free_port, stream, undisturbed_stream, until
from tests.support import end, run

TIMEOUT_S = 60.0  # it takes less than ten
STOP_TIMEOUT_S = 10.0
WORKER = (sys.executable, "-m", "asyncpipe_workers", "--device", "cpu")

NODES = ("127.0.0.1", "127.0.0.2")  # names that need nobody who knows them
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
NodeName=127.0.0.[1-2] NodeHostname=localhost Port={ports[1]},{ports[2]}
PartitionName=all Nodes=ALL Default=YES
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SelectType=select/linear
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
"""
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"  # nothing uses it; others look for systemd first


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"), max_positions=512)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> tuple[int, ...]:
    return undisturbed_stream(checkpoint)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where launchers keep their files. Its path is short enough for sockets, and known to every process that a test starts:
    none of them may be left in the end."""
    with tempfile.TemporaryDirectory(prefix="asyncpipe-") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)
        try:
            wait_until(lambda: not processes_told_of(name), "the end of all processes", timeout_s=STOP_TIMEOUT_S)
        finally:
            for pid in processes_told_of(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What srun finds: two nodes, both this machine."""
    munged, slurmctld, slurmd, sinfo = map(find_program, ("munged", "slurmctld", "slurmd", "sinfo"))
    try:
        socket.getaddrinfo("127.0.0.1", None, socket.AF_INET, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror:
        pytest.skip("Slurm finds no addresses on a machine without a network")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:  # of a job in which the tests may run
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    ports = [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, ports=ports, user=pwd.getpwuid(os.geteuid()).pw_name))
    (folder / "cgroup.conf").write_text(CGROUP_CONF)
    for directory in ("state", *NODES):
        (folder / directory).mkdir()

    def all_idle() -> bool:
        command = [sinfo, "--noheader", "--Node", "--format=%T"]
        states = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S).stdout.split()
        return states == ["idle"] * len(NODES)

    with contextlib.ExitStack() as stack:
        stack.enter_context(daemon(munged, *munge_options(folder)))
        wait_until((folder / "munge.socket").exists, "munged", timeout_s=STOP_TIMEOUT_S)
        stack.enter_context(daemon(slurmctld, "-D"))
        for node in NODES:
            stack.enter_context(daemon(slurmd, "-D", "-N", node))
        wait_until(all_idle, "the nodes", timeout_s=TIMEOUT_S)
        yield
        wait_until(all_idle, "the end of the job", timeout_s=STOP_TIMEOUT_S)  # which would outlive slurmd


def munge_options(folder: Path) -> list[str]:
    """Of a daemon by which only we are authenticated."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    return ["--foreground", "--force", *(f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items())]


@contextlib.contextmanager
def daemon(*command: str) -> Iterator[None]:
    """Its last words are shown if the test fails."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            yield
        finally:
            end(process, timeout_s=STOP_TIMEOUT_S)
            log.seek(0)
            print(*command, *log.read().decode(errors="replace").splitlines()[-20:], sep="\n    ")


def find_program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def wait_until(condition: Callable[[], object], what: str, *, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)


def processes_told_of(path: str) -> list[int]:
    """Those with the path in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is not ours
            if path.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


async def environments_of_stages(machines: Cluster, undisturbed: tuple[int, ...]) -> list[dict[str, str]]:
    async with machines.client() as client:
        status = await until(client, lambda status: status.state == "running")
        assert await stream(client) == undisturbed
        return [environment(stage.pid) for stage in status.stages]


def rank_0_late(rank: str) -> list[str]:
    """A worker, to which the launcher tells its rank by this variable. Stage 0 is not merely the first who comes."""
    return ["sh", "-c", f'[ "${rank}" != 0 ] || sleep 1; exec "$@"', "sh", *WORKER]


def test_workers_of_torchrun_become_the_stages_of_their_ranks(
    checkpoint: Path, undisturbed: tuple[int, ...], folder: Path
) -> None:
    async def scenario() -> None:
        async with cluster(checkpoint) as machines:
            await machines.coordinator("--stages", "2")
            argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            argv += ["--master-addr", "127.0.0.1", "--master-port", "0", "--no-python"]
            await machines.launcher(*argv, *rank_0_late("RANK"))
            stages = await environments_of_stages(machines, undisturbed)
            assert [stage["RANK"] for stage in stages] == ["0", "1"]

    run(scenario(), timeout_s=TIMEOUT_S)


def test_workers_of_open_mpi_become_the_stages_of_their_ranks(
    checkpoint: Path, keys: Path, undisturbed: tuple[int, ...], folder: Path
) -> None:
    """They look for the coordinator at the address that mpirun has on the network, and so have keys."""
    mpirun = find_program("mpirun")

    async def scenario() -> None:
        async with cluster(checkpoint, keys) as machines:
            await machines.coordinator("--stages", "2", "--bind", machines.address.replace("//127.0.0.1", "//0.0.0.0"))
            argv = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", "--bind-to", "none", "-x", "ASYNCPIPE_KEYS"]
            await machines.launcher(*argv, *rank_0_late("OMPI_COMM_WORLD_RANK"))
            stages = await environments_of_stages(machines, undisturbed)
            assert [stage["OMPI_COMM_WORLD_RANK"] for stage in stages] == ["0", "1"]

    run(scenario(), timeout_s=TIMEOUT_S)


def test_workers_of_slurm_become_the_stages_of_their_ranks(checkpoint: Path, undisturbed: tuple[int, ...], slurm: None) -> None:
    """The coordinator is on the first node of the job."""

    async def scenario() -> None:
        async with cluster(checkpoint) as machines:
            await machines.coordinator("--stages", "2")
            srun = [find_program("srun"), "--nodes", "2", "--ntasks-per-node", "1"]
            await machines.launcher(*srun, *rank_0_late("SLURM_PROCID"))
            stages = await environments_of_stages(machines, undisturbed)
            assert [stage["SLURM_PROCID"] for stage in stages] == ["0", "1"]
            assert [stage["SLURMD_NODENAME"] for stage in stages] == list(NODES)
            assert {stage["SLURM_STEP_NODELIST"] for stage in stages} == {"127.0.0.[1-2]"}

    run(scenario(), timeout_s=TIMEOUT_S)
