"""The images, built, and the containers of a compose file, up: what the tests look at."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.docker.base_image import a_base_image
from tests.docker.engine import Engine, Unavailable

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 1200.0
UP_TIMEOUT_S = 180.0
PROJECT = f"asyncpipe-test-{os.getpid()}"


@dataclass(frozen=True)
class Images:
    """Names of what has been built."""

    coordinator: str
    worker: str


@contextlib.contextmanager
def built_images(engine: Engine) -> Iterator[Images]:
    """From this working tree. On an engine of our own from a base image of our own, else from the public one."""
    images = Images(f"asyncpipe-coordinator:{PROJECT}", f"asyncpipe-worker:{PROJECT}")
    names = {"coordinator": images.coordinator, "worker": images.worker}
    with contextlib.ExitStack() as stack:
        arguments = stack.enter_context(a_base_image(engine, f"{PROJECT}-base")) if engine.is_own else []
        for name in names.values():
            stack.callback(_remove_image, engine, name)
        _build_all(engine, names, arguments)
        yield images


def _build_all(engine: Engine, names: dict[str, str], arguments: list[str]) -> None:
    """At the same time: each is mostly pip, on one core. Raises RuntimeError with the last lines of one that fails."""
    logs = {role: engine.folder / f"{role}.log" for role in names}
    with contextlib.ExitStack() as stack:
        builds: dict[str, subprocess.Popen[bytes]] = {}
        for role, name in names.items():
            output = stack.enter_context(logs[role].open("wb"))
            command = ["docker", "build", f"--file={ROOT}/docker/{role}.Dockerfile", f"--tag={name}", *arguments, str(ROOT)]
            process = subprocess.Popen(command, env=engine.environment(), stdout=output, stderr=output)
            builds[role] = process
            stack.callback(process.wait)
            stack.callback(process.kill)
        for role, process in builds.items():
            if process.wait(BUILD_TIMEOUT_S) != 0:
                raise RuntimeError(f"the {role}'s image was not built:\n{logs[role].read_text()[-5000:]}")


def _remove_image(engine: Engine, name: str) -> None:
    with contextlib.suppress(RuntimeError):  # it was never built
        engine.docker("image", "rm", name)


class Stack:
    """What `docker compose up` makes of a file."""

    def __init__(self, engine: Engine, file: Path, images: Images) -> None:
        self.engine = engine
        self.images = images
        self.address = f"tcp://127.0.0.1:{(port := _free_port())}"
        self._command = [*_compose_command(engine, file), f"--project-name={PROJECT}"]
        self._env = {
            "ASYNCPIPE_COORDINATOR_IMAGE": images.coordinator,
            "ASYNCPIPE_WORKER_IMAGE": images.worker,
            "ASYNCPIPE_PUBLISH": f"127.0.0.1:{port}",
        }

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        try:
            self.compose("up", "--detach", "--no-build")
            yield
        finally:
            self.compose("down", "--volumes", "--timeout=5")

    def compose(self, *arguments: str) -> str:
        return self.engine.run(*self._command, *arguments, timeout_s=UP_TIMEOUT_S, env=self._env)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """An exception gets the containers' last words."""
        try:
            yield
        except BaseException as error:
            error.add_note(self.compose("logs", "--no-color", "--tail=60"))
            raise

    def container(self, service: str) -> str:
        """Its id."""
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.engine.docker("inspect", self.container(service)))
        return found[0]

    def copy_keys(self, target: Path) -> Path:
        """As a user would take them out of the volume."""
        self.engine.docker("cp", f"{self.container('coordinator')}:/keys", str(target))
        return target

    @contextlib.contextmanager
    def killer(self, service: str) -> Iterator[Callable[[], None]]:
        """Something to call in a hurry: SIGKILL for the service's main process, as the kernel does when memory is short.

        It comes from a container that sees the host's processes: after `docker kill` nothing would be restarted.
        """
        script = f"import os; print('ready', flush=True); input(); os.kill({self.inspect(service)['State']['Pid']}, 9)"
        command = ["docker", "run", "--rm", "--interactive", "--network=none", "--pid=host", "--user=0", "--entrypoint=python"]
        process = self.engine.start(*command, self.images.coordinator, "-c", script)
        with process:
            trigger, output = process.stdin, process.stdout
            assert trigger is not None
            assert output is not None
            assert output.readline() == "ready\n"
            yield lambda: print(file=trigger, flush=True)
            trigger.close()
            assert process.wait(30) == 0

    def wait_until_healthy(self, *services: str, timeout_s: float = 90.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while states := {name: state for name in services if (state := self._health(name)["Status"]) != "healthy"}:
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not healthy within {timeout_s:g} s: {states}\n{self.compose('logs')}")
            time.sleep(0.5)

    def _health(self, service: str) -> dict[str, Any]:
        health: dict[str, Any] = self.inspect(service)["State"]["Health"]
        return health


def _compose_command(engine: Engine, file: Path) -> list[str]:
    """Raises Unavailable."""
    with contextlib.suppress(RuntimeError):
        engine.docker("compose", "version")
        return ["docker", "compose", f"--file={file}"]
    if shutil.which("docker-compose") is None:
        raise Unavailable("Docker Compose is not installed")
    return ["docker-compose", f"--file={_for_version_1(file, engine.folder)}", f"--project-directory={file.parent}"]


def _for_version_1(file: Path, folder: Path) -> Path:
    """Debian 12's compose does not know the top-level `name`."""
    lines = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith("name:")]
    copy = folder / file.name
    copy.write_text("".join(lines))
    return copy


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
