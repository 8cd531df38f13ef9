"""Coordinator, workers and client on hosts of their own, with keys, whose cables are slow or cut."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncpipe import Client, connect
from asyncpipe.client.sampling import SamplingOptions
from asyncpipe.process import ChildProcess, die_with_parent
from asyncpipe.wire.links import LinkKind
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.checkpoints import distinct_prompts, make_opt
from tests.namespaces import Host, Network, Unavailable, a_network
from tests.support import run

pytestmark = pytest.mark.xdist_group("namespaces")

WORKERS = ("worker-0", "worker-1", "worker-2")
HOSTS = ("client", "coordinator", *WORKERS)
PORT = 5550
TERMINATED = 143  # the exit status of who obeys SIGTERM
SERVE_OPTIONS = ("--workers", "external", "--stages", "2", "--threads-per-stage", "1")  # all hosts share this machine's cores
PROMPTS = distinct_prompts(8)
NUM_TOKENS = 200  # of a stream that something happens to in the middle
CUT_AT = 40
FEW_TOKENS = 40
RECOVERY_S = 20.0  # it takes 2 to 3, most of it until the silence is noticed
SLOW_S, LATE_S = 0.02, 1.0
LISTENING = "0A"  # a state in /proc/net/tcp


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(a_network(HOSTS))
        except Unavailable as error:
            pytest.skip(str(error))
        yield network


@pytest.fixture
def network(hosts: Network) -> Iterator[Network]:
    yield hosts
    hosts.heal()
    hosts.delay(0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"), max_positions=512)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> list[list[int]]:
    """What one process on this machine continues each of PROMPTS with, the first of them for longest."""

    async def scenario() -> list[list[int]]:
        config = ServiceConfig(checkpoint=checkpoint, threads_per_stage=1)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            lengths = [NUM_TOKENS] + [FEW_TOKENS] * (len(PROMPTS) - 1)
            answers = [client.generate(prompt, **sampled(length)) for prompt, length in zip(PROMPTS, lengths, strict=True)]
            return [list(answer.token_ids) for answer in await asyncio.gather(*answers)]

    return run(scenario(), timeout_s=60)


def sampled(num_tokens: int) -> SamplingOptions:
    """So that no two tokens in a row are alike for long, and a lost or repeated one makes a difference."""
    return {"max_new_tokens": num_tokens, "ignore_eos": True, "temperature": 1.0, "seed": 11}


class Token(msgspec.Struct):
    """As the client's process prints it."""

    prompt: int
    index: int
    token_id: int
    at_s: float  # by the clock of all processes


@dataclass
class Cluster:
    """Processes as people start them, each on its host."""

    network: Network
    model: Path
    keys: Path
    processes: list[tuple[Host, ChildProcess]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"tcp://{self.network['coordinator'].ip}:{PORT}"

    async def coordinator(self, *options: str) -> None:
        serve = ("asyncpipe_coordinator", "serve", str(self.model), *SERVE_OPTIONS)
        await self._start("coordinator", *serve, "--bind", self.address, "--log-level", "info", *options)

    async def worker(self, host: str) -> None:
        await self._start(host, "asyncpipe_workers", "--coordinator", self.address, "--device", "cpu", "--log-level", "info")

    async def status(self, **fields: object) -> Status:
        """As soon as these of its fields have these values."""
        [line] = [line async for line in self._client(print_status, **fields)]
        return msgspec.json.decode(line, type=Status)

    async def stream(
        self, *, num_prompts: int, num_tokens: int = NUM_TOKENS, at_token: Callable[[Token], object] = lambda _: None
    ) -> list[Token]:
        """Of the first of PROMPTS, all at once. `at_token` hears each token when it is there."""
        tokens = []
        async for line in self._client(print_tokens, num_prompts=num_prompts, num_tokens=num_tokens):
            tokens.append(msgspec.json.decode(line, type=Token))
            at_token(tokens[-1])
        return tokens

    async def _client(self, task: Callable[..., object], **arguments: object) -> AsyncIterator[bytes]:
        """The lines that `task` prints, in a process on the client's host."""
        argv = (__name__, self.address, task.__name__, json.dumps(arguments))
        client = await self._start("client", *argv, stdout=asyncio.subprocess.PIPE)
        async for line in client.output:
            yield line
        assert await client.wait() == 0, client.stderr_tail()

    async def _start(self, host: str, module: str, *arguments: str, stdout: int = asyncio.subprocess.DEVNULL) -> ChildProcess:
        there = self.network[host]
        env = os.environ | {"OMP_NUM_THREADS": "1", "ASYNCPIPE_KEYS": str(self.keys)}
        argv = there.command([sys.executable, "-m", module, *arguments])
        process = await ChildProcess.spawn(argv, env=env, name=host, stdout=stdout)
        self.processes.append((there, process))
        return process


@contextlib.asynccontextmanager
async def a_cluster(network: Network, model: Path, keys: Path, *options: str, num_workers: int) -> AsyncIterator[Cluster]:
    """Two stages; further workers are spares."""
    cluster = Cluster(network, model, keys)
    try:
        await cluster.coordinator(*options)
        await asyncio.gather(*(cluster.worker(host) for host in WORKERS[:num_workers]))
        await cluster.status(state="running", spares=num_workers - 2)
        yield cluster
    finally:
        await asyncio.gather(*(process.stop() for _, process in cluster.processes))
        for _, process in cluster.processes:
            print(process.name, process.describe_exit(), *process.stderr_tail(), sep="\n    ")  # shown if the test fails
    servers = {process.returncode for _, process in cluster.processes if process.name != "client"}
    assert servers == {TERMINATED}, "they end in order"


def in_the_middle(cut: Callable[[], object]) -> Callable[[Token], object]:
    """For `at_token`: in the middle of the stream."""
    return lambda token: cut() if token.index == CUT_AT else None


def token_ids_of(tokens: Sequence[Token]) -> list[list[int]]:
    """By prompt."""
    found: dict[int, list[int]] = {}
    for token in tokens:
        assert token.index == len(found.setdefault(token.prompt, [])), "a token was lost or repeated"
        found[token.prompt].append(token.token_id)
    return [token_ids for _, token_ids in sorted(found.items())]


def longest_pause_s(tokens: Sequence[Token]) -> float:
    return max(after.at_s - before.at_s for before, after in itertools.pairwise(tokens))


def tokens_per_s(tokens: Sequence[Token]) -> float:
    return (len(tokens) - 1) / (tokens[-1].at_s - tokens[0].at_s)


def listening_on(pid: int) -> set[str]:
    """All addresses on which somebody listens on the host of a process."""
    return set(_listening(pid, "tcp", socket.AF_INET)) | set(_listening(pid, "tcp6", socket.AF_INET6))


def _listening(pid: int, table: str, family: int) -> Iterator[str]:
    for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        if state == LISTENING:
            address = bytes.fromhex(local.partition(":")[0])  # words of four bytes, each the wrong way round
            words = [address[start : start + 4][::-1] for start in range(0, len(address), 4)]
            yield socket.inet_ntop(family, b"".join(words))


def socket_on(host: Host) -> socket.socket:
    made = host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.bind((host.ip, 0))
    made.settimeout(LATE_S)
    return made


def round_trip_s(asking: socket.socket, answering: socket.socket) -> float:
    """Raises TimeoutError when a packet does not arrive."""
    start_s = time.monotonic()
    asking.sendto(b"?", answering.getsockname())
    answering.sendto(*answering.recvfrom(1))
    asking.recv(1)
    return time.monotonic() - start_s


def test_packets_are_as_late_as_they_should_be_and_do_not_pass_where_a_cable_is_cut(network: Network) -> None:
    with contextlib.ExitStack() as stack:
        left, right, third = (stack.enter_context(socket_on(network[name])) for name in HOSTS[:3])
        network.delay(SLOW_S)
        assert 2 * SLOW_S <= round_trip_s(left, right) < LATE_S
        network.part(HOSTS[0], HOSTS[1])
        with pytest.raises(TimeoutError):
            round_trip_s(left, right)
        assert round_trip_s(left, third) < LATE_S
        network.cut(HOSTS[2])
        with pytest.raises(TimeoutError):
            round_trip_s(left, third)
        network.heal()
        assert round_trip_s(left, right) < LATE_S
        assert round_trip_s(left, third) < LATE_S


def test_cables_carry_much_at_once_and_change_nothing(network: Network) -> None:
    data = os.urandom(8 << 20)
    left, right = network["client"], network["coordinator"]
    with right.call(lambda: socket.create_server((right.ip, 0))) as server, ThreadPoolExecutor(1) as pool:
        sender = left.call(lambda: socket.create_connection(server.getsockname(), timeout=30))
        receiver, _ = server.accept()
        with sender, receiver, receiver.makefile("rb") as arriving:
            sending = pool.submit(sender.sendall, data)
            assert arriving.read(len(data)) == data
            sending.result()


@pytest.mark.parametrize("link", [LinkKind.ZMQ, LinkKind.GLOO])
def test_tokens_of_four_hosts_equal_those_of_one_process(
    network: Network, checkpoint: Path, keys: Path, undisturbed: list[list[int]], link: LinkKind
) -> None:
    async def scenario() -> None:
        async with a_cluster(network, checkpoint, keys, "--link", link, num_workers=2) as cluster:
            tokens = await cluster.stream(num_prompts=8, num_tokens=FEW_TOKENS)
            assert token_ids_of(tokens) == [token_ids[:FEW_TOKENS] for token_ids in undisturbed]
            stages = (await cluster.status()).stages
            assert {stage.host for stage in stages} == set(WORKERS[:2])
            assert [stage.link for stage in stages] == [link, LinkKind.ZMQ]
            running = [(host, process.pid) for host, process in cluster.processes if process.returncode is None]
            assert [listening_on(pid) for _, pid in running] == [{host.ip} for host, _ in running]
            assert len(running) == 3

    run(scenario(), timeout_s=90)


def test_when_the_cable_of_a_stage_is_cut_its_stream_goes_on_and_later_it_is_a_spare(
    network: Network, checkpoint: Path, keys: Path, undisturbed: list[list[int]]
) -> None:
    async def scenario() -> None:
        async with a_cluster(network, checkpoint, keys, num_workers=3) as cluster:
            struck = (await cluster.status()).stages[1].host
            tokens = await cluster.stream(num_prompts=1, at_token=in_the_middle(lambda: network.cut(struck)))
            assert token_ids_of(tokens) == undisturbed[:1]
            assert longest_pause_s(tokens) < RECOVERY_S
            after = await cluster.status()
            assert struck not in {stage.host for stage in after.stages}
            assert (after.restarts, after.spares, after.requests_failed) == (1, 0, 0)
            network.heal()
            again = await cluster.status(spares=1)
            assert (again.state, again.restarts) == ("running", 1)

    run(scenario(), timeout_s=90)


def test_when_the_hosts_of_two_stages_are_parted_their_stream_goes_on(
    network: Network, checkpoint: Path, keys: Path, undisturbed: list[list[int]]
) -> None:
    """Both still reach the coordinator, so that each is a worker as good as any."""

    async def scenario() -> None:
        async with a_cluster(network, checkpoint, keys, num_workers=3) as cluster:
            ends = [stage.host for stage in (await cluster.status()).stages]
            tokens = await cluster.stream(num_prompts=1, at_token=in_the_middle(lambda: network.part(*ends)))
            assert token_ids_of(tokens) == undisturbed[:1]
            assert longest_pause_s(tokens) < RECOVERY_S
            after = await cluster.status(spares=1)
            assert {stage.host for stage in after.stages} != set(ends)
            assert (after.restarts, after.requests_failed) == (1, 0)

    run(scenario(), timeout_s=90)


def test_a_worker_that_its_neighbours_cannot_reach_is_no_stage(
    network: Network, checkpoint: Path, keys: Path, undisturbed: list[list[int]]
) -> None:
    """Whichever stage it was given first: it reaches only the coordinator, and the two others are enough."""

    async def scenario() -> None:
        for other in (WORKERS[0], WORKERS[2]):
            network.part(WORKERS[1], other)
        async with a_cluster(network, checkpoint, keys, num_workers=3) as cluster:
            tokens = await cluster.stream(num_prompts=1)
            assert token_ids_of(tokens) == undisturbed[:1]
            assert WORKERS[1] not in {stage.host for stage in (await cluster.status()).stages}

    run(scenario(), timeout_s=90)


def test_slow_cables_are_kept_full_by_several_requests(
    network: Network, checkpoint: Path, keys: Path, undisturbed: list[list[int]]
) -> None:
    """Each micro-batch has one sequence, so that requests share no step. Of one alone, every token still travels twice: to
    stage 1, and from there to stage 0."""

    async def scenario() -> None:
        options = ("--micro-batches", "8", "--max-sequences", "1")
        network.delay(SLOW_S)
        async with a_cluster(network, checkpoint, keys, *options, num_workers=2) as cluster:
            alone = await cluster.stream(num_prompts=1, num_tokens=FEW_TOKENS)
            together = await cluster.stream(num_prompts=8, num_tokens=FEW_TOKENS)
            assert token_ids_of(alone) == [undisturbed[0][:FEW_TOKENS]]
            assert token_ids_of(together) == [token_ids[:FEW_TOKENS] for token_ids in undisturbed]
            assert tokens_per_s(alone) < 1 / (2 * SLOW_S)
            assert tokens_per_s(together) > 3 * tokens_per_s(alone)

    run(scenario(), timeout_s=90)


# --- the client's process ---------------------------------------------------------------------------------------------


async def print_status(client: Client, **fields: object) -> None:
    status = await client.status()
    while {name: getattr(status, name) for name in fields} != fields:
        await asyncio.sleep(0.05)
        status = await client.status()
    print(msgspec.json.encode(status).decode())


async def print_tokens(client: Client, *, num_prompts: int, num_tokens: int) -> None:
    async def one(prompt: int) -> None:
        async for piece in client.stream(PROMPTS[prompt], **sampled(num_tokens)):
            token = Token(prompt, piece.index, piece.token_id, time.monotonic())
            print(msgspec.json.encode(token).decode(), flush=True)

    await asyncio.gather(*map(one, range(num_prompts)))


async def be_client(address: str, task: str, arguments: dict[str, Any]) -> None:
    async with connect(address, timeout_s=60.0) as client:
        await {"print_status": print_status, "print_tokens": print_tokens}[task](client, **arguments)


if __name__ == "__main__":
    die_with_parent()
    run(be_client(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])), timeout_s=60.0)
