"""A Docker engine for the tests: the one that runs here already, or one of our own, of which nothing is left in the end."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import end

NEEDED = ("docker", "dockerd", "containerd", "mmdebstrap", "iptables", "ip")  # tests/install.sh installs them
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
INTERFACES = Path("/sys/class/net")


class Unavailable(Exception):
    """No engine can run here, and why."""


class Engine(NamedTuple):
    """`folder` is empty and is removed with the engine."""

    host: str  # for DOCKER_HOST
    is_own: bool
    folder: Path

    def docker(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """What `docker ARGUMENTS` prints. Raises RuntimeError with all of it when it fails."""
        return self.run("docker", *arguments, timeout_s=timeout_s)

    def run(self, *command: str, timeout_s: float = 120.0, env: dict[str, str] | None = None) -> str:
        """Standard output of a command that talks to this engine. Raises RuntimeError with all of it when it fails."""
        full_env = self.environment() | (env or {})
        done = subprocess.run(command, env=full_env, capture_output=True, text=True, timeout=timeout_s)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command to talk to through pipes."""
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment(), stdin=pipe, stdout=pipe, text=True)

    def environment(self) -> dict[str, str]:
        """For commands that talk to this engine."""
        return os.environ | {"DOCKER_HOST": self.host, "DOCKER_CLI_HINTS": "false"}


@contextlib.contextmanager
def an_engine() -> Iterator[Engine]:
    """Raises Unavailable."""
    folder = Path(tempfile.mkdtemp(prefix="asyncpipe-docker-"))
    on_term = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what follows is undone then, too
    try:
        running = running_engine()
        if running is not None:
            yield Engine(running, is_own=False, folder=folder)
            return
        check_prerequisites()
        with unchanged_network(), own_engine(folder) as host:
            yield Engine(host, is_own=True, folder=folder)
    finally:
        shutil.rmtree(folder)
        signal.signal(signal.SIGTERM, on_term)


def running_engine() -> str | None:
    """Its address; None when nobody answers at DOCKER_HOST or where engines usually are."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    return host if shutil.which("docker") and _answers(host) else None


def check_prerequisites() -> None:
    if sys.platform != "linux":
        raise Unavailable("a Docker engine of our own needs Linux, and none runs here")
    if os.geteuid() != 0:
        raise Unavailable("a Docker engine of our own needs root, and none runs here")
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"{', '.join(missing)} not found, and no Docker engine runs here")


@contextlib.contextmanager
def own_engine(folder: Path) -> Iterator[str]:
    """`dockerd` with all that it keeps in `folder`. Raises Unavailable when it does not start."""
    host, log = f"unix://{folder}/docker.sock", folder / "dockerd.log"
    command = ["dockerd", "--host", host, "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")]
    command += ["--pidfile", str(folder / "dockerd.pid"), "--bridge", "none"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    try:
        _until_ready(process, host, log)
        yield host
    finally:
        end(process, timeout_s=STOP_TIMEOUT_S)
        _kill_those_of(folder)
        _unmount_below(folder)


@contextlib.contextmanager
def unchanged_network() -> Iterator[None]:
    """Firewall rules, forwarding and interfaces are in the end as they were: dockerd leaves some behind."""
    tables = [tool for tool in ("iptables", "ip6tables") if shutil.which(f"{tool}-save")]
    rules = {tool: subprocess.run([f"{tool}-save"], capture_output=True).stdout for tool in tables}
    forwarding, interfaces = IP_FORWARD.read_text(), set(os.listdir(INTERFACES))
    try:
        yield
    finally:
        for name in set(os.listdir(INTERFACES)) - interfaces:
            subprocess.run(["ip", "link", "delete", name], capture_output=True)
        for tool, saved in rules.items():
            _restore_rules(tool, saved)
        IP_FORWARD.write_text(forwarding)


def _restore_rules(tool: str, saved: bytes) -> None:
    """Tables that were not there before become empty: restoring leaves those alone that it does not read of."""
    now = subprocess.run([f"{tool}-save"], capture_output=True).stdout
    new = [lines for table, lines in _built_in_chains(now).items() if table not in _built_in_chains(saved)]
    subprocess.run([f"{tool}-restore"], input=b"\n".join([saved, *itertools.chain(*new), b""]), capture_output=True)


def _built_in_chains(rules: bytes) -> dict[bytes, list[bytes]]:
    """By table: what makes it a table without rules. Chains that somebody has made have no policy, but a dash."""
    tables: dict[bytes, list[bytes]] = {}
    for line in rules.splitlines():
        if line.startswith(b"*"):
            table = tables[line] = [line]
        elif line.startswith(b":") and line.split()[1] != b"-":
            table.append(line.split()[0] + b" ACCEPT [0:0]")
        elif line == b"COMMIT":
            table.append(line)
    return tables


def _answers(host: str) -> bool:
    command = ["docker", "--host", host, "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def _until_ready(process: subprocess.Popen[bytes], host: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not _answers(host):
        if process.poll() is not None or time.monotonic() > deadline_s:
            last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise Unavailable(f"a Docker engine does not start here:\n{last_lines}")
        time.sleep(0.2)


def _kill_those_of(folder: Path) -> None:
    """containerd and its shims, when dockerd could not end them: their command lines name our folder."""
    _until(lambda: not _processes_of(folder), timeout_s=5.0)
    for pid in _processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _until(lambda: not _processes_of(folder), timeout_s=5.0)


def _processes_of(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def _unmount_below(folder: Path) -> None:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True):
        subprocess.run(["umount", "--lazy", point], capture_output=True)


def _until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.1)
