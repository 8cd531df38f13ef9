"""The images and docker/compose.cpu.yaml, on a real Docker engine. `make test-docker` runs this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import asyncpipe
from tests.docker.engine import Unavailable, an_engine
from tests.docker.stack import ROOT, Stack, built_images
from tests.support import run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

PROMPT = "def "
NUM_TOKENS = 400
KILL_AT = 20
TERMINATED = 143  # the exit status of a process that obeyed SIGTERM
SERVICES = ("coordinator", "worker-0", "worker-1")
WORKER_HEALTH = ("python", "-IS", "/usr/local/lib/asyncpipe/worker_health.py")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Up, and running nothing."""
    try:
        with an_engine() as engine, built_images(engine) as images:
            stack = Stack(engine, ROOT / "docker/compose.cpu.yaml", images)
            with stack.up():
                yield stack
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def keys(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stack.copy_keys(tmp_path_factory.mktemp("outside") / "keys")


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What the same model gives without containers, on one stage."""

    async def scenario() -> list[int]:
        async with asyncpipe.local(stages=1) as client:
            return list((await client.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)).token_ids)

    return run(scenario(), timeout_s=60)


def test_a_client_outside_gets_the_same_tokens(stack: Stack, keys: Path, expected: list[int]) -> None:
    assert generate(stack, keys) == expected


def test_a_worker_killed_mid_stream_comes_back_and_no_token_is_lost_or_changed(
    stack: Stack, keys: Path, expected: list[int]
) -> None:
    async def scenario(kill: Callable[[], None]) -> list[int]:
        token_ids: list[int] = []
        async with asyncpipe.connect(stack.address, keys=keys) as client:
            async for piece in client.stream(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True):
                assert piece.index == len(token_ids)
                token_ids.append(piece.token_id)
                if piece.index == KILL_AT:
                    kill()
        return token_ids

    with stack.explained(), stack.killer("worker-1") as kill:
        assert run(scenario(kill), timeout_s=120) == expected
    assert stack.inspect("worker-1")["RestartCount"] == 1, "the restart policy has brought it back"


def test_every_service_becomes_healthy(stack: Stack) -> None:
    stack.wait_until_healthy(*SERVICES)


def test_workers_find_a_coordinator_that_was_stopped_and_started(stack: Stack, keys: Path, expected: list[int]) -> None:
    stack.compose("stop", "coordinator")
    assert stack.inspect("coordinator")["State"]["ExitCode"] == TERMINATED, "SIGTERM did not reach it, or it did not obey"
    with pytest.raises(RuntimeError, match="not connected"):
        stack.engine.docker("exec", stack.container("worker-0"), *WORKER_HEALTH)
    stack.compose("start", "coordinator")
    assert generate(stack, keys) == expected


def test_strangers_are_refused(stack: Stack, keys: Path) -> None:
    async def scenario() -> None:
        async with asyncpipe.connect(stack.address) as client:
            await client.status()

    with pytest.raises(asyncpipe.AsyncPipeError):
        run(scenario(), timeout_s=60)


def test_another_start_keeps_the_keys(stack: Stack, keys: Path, tmp_path: Path) -> None:
    stack.compose("up", "--detach", "--no-build")
    again = stack.copy_keys(tmp_path / "keys")
    names = [path.relative_to(keys) for path in keys.rglob("*") if path.is_file()]
    assert names
    assert {name: (again / name).read_bytes() for name in names} == {name: (keys / name).read_bytes() for name in names}


def test_containers_run_as_nobody_special(stack: Stack) -> None:
    for service in SERVICES:
        found = stack.inspect(service)
        assert found["Config"]["User"] == "10001:10001"
        assert "PYTHONSAFEPATH=1" in found["Config"]["Env"]
        assert found["HostConfig"]["ReadonlyRootfs"]
        assert found["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"


@pytest.mark.parametrize("role", ["coordinator", "worker"])
def test_images_hold_no_tools_and_only_workers_hold_torch(stack: Stack, role: str) -> None:
    image = {"coordinator": stack.images.coordinator, "worker": stack.images.worker}[role]
    script = (
        "import importlib.util, shutil; "
        "print([name for name in ('torch', 'transformers', 'pip') if importlib.util.find_spec(name)], "
        "[tool for tool in ('cc', 'gcc', 'c++', 'make', 'git') if shutil.which(tool)])"
    )
    printed = stack.engine.docker("run", "--rm", "--network=none", "--entrypoint=python", image, "-c", script)
    assert printed.strip() == {"coordinator": "[] []", "worker": "['torch', 'transformers'] []"}[role]


def test_workers_stop_when_told_to(stack: Stack) -> None:
    """The last test: nothing runs after it."""
    stack.compose("stop")
    assert [stack.inspect(service)["State"]["ExitCode"] for service in SERVICES] == [TERMINATED] * len(SERVICES)


def generate(stack: Stack, keys: Path) -> list[int]:
    """From outside, as soon as the pipeline is there."""

    async def scenario() -> list[int]:
        async with asyncpipe.connect(stack.address, keys=keys) as client:
            return list((await client.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)).token_ids)

    with stack.explained():
        return run(scenario(), timeout_s=120)
