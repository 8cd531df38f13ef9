"""The two ends of a tensor link that the tests play with: in one process, or each in its own.

A play is what both ends do. They take turns by words over a socket pair, which a child process inherits:

    python -m tests.contract.link_peers PLAY END KIND DEVICE TIMEOUT_S FD
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from asyncpipe.actors import ActorSystem, TensorPort
from asyncpipe.errors import AsyncPipeError, Broken, Closed, Timeout
from asyncpipe.wire.tensors import Tensor
from asyncpipe_workers.links import LinkKind, LinkOffer, TensorLink, TransferStatistics, host, join
from asyncpipe_workers.links.in_flight import InFlight
from asyncpipe_workers.staging import from_wire, to_wire
from tests.support import run

EPOCH = 3
IP = "127.0.0.1"
NAMES = {"sender": "stage 0", "receiver": "stage 1"}
MAX_IN_FLIGHT = 4
LARGE = torch.ones(16_000_000)  # 64 MB: a signal finds it on its way
ROOT = Path(__file__).parents[2]


class Words:
    """One end of a conversation, by which the ends of a play take turns."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    async def __aenter__(self) -> Words:
        self._reader, self._writer = await asyncio.open_connection(sock=self._end)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def tell(self, word: str) -> None:
        self._writer.write(word.encode() + b"\n")

    async def hear(self) -> str:
        """Raises Broken when the other end has left."""
        async with asyncio.timeout(20):
            line = await self._reader.readline()
        if not line:
            raise Broken("the other player has left")
        return line.decode().strip()

    async def hears(self, word: str) -> None:
        heard = await self.hear()
        assert heard == word


@dataclass(frozen=True)
class Player:
    """What an end of a play has."""

    link: TensorLink
    words: Words
    device: torch.device

    def send(self, tag: int, tensor: torch.Tensor) -> asyncio.Future[None]:
        return self.link.send(tag, tensor.to(self.device))

    def recv(self, tag: int, like: torch.Tensor) -> asyncio.Future[torch.Tensor]:
        return self.link.recv(tag, shape=tuple(like.shape), dtype=like.dtype)

    async def recv_equal(self, tag: int, expected: torch.Tensor) -> None:
        assert torch.equal((await self.recv(tag, expected)).cpu(), expected)


Part = Callable[[Player], Awaitable[None]]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(100).to(dtype)


# --- plays ---


def many_kinds() -> list[torch.Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
    return [
        *(numbers(3, 5, dtype=dtype) for dtype in dtypes),
        numbers(6, 4).t(),  # not contiguous
        numbers(7, 8)[:, 2:4],
        torch.tensor(2.5),
        numbers(1024, 2048),
    ]


async def send_many_kinds(player: Player) -> None:
    for tag, tensor in enumerate(many_kinds()):
        await player.send(tag, tensor)
    await player.words.hears("all came")


async def recv_many_kinds(player: Player) -> None:
    for tag, tensor in enumerate(many_kinds()):
        await player.recv_equal(tag, tensor)
    player.words.tell("all came")


async def send_when_receives_are_posted(player: Player) -> None:
    await player.words.hears("posted")
    sends = [player.send(tag, numbers(50_000, seed=tag)) for tag in range(MAX_IN_FLIGHT)]
    await asyncio.gather(*sends)
    await player.words.hears("all came")


async def recv_all_at_once(player: Player) -> None:
    receives = [player.recv(tag, numbers(50_000)) for tag in range(MAX_IN_FLIGHT)]
    assert player.link.statistics().in_flight == MAX_IN_FLIGHT
    player.words.tell("posted")
    for tag, tensor in enumerate(await asyncio.gather(*receives)):
        assert torch.equal(tensor.cpu(), numbers(50_000, seed=tag))
    assert player.link.statistics() == TransferStatistics(
        in_flight=0,
        high_water_mark=MAX_IN_FLIGHT,
        capacity=MAX_IN_FLIGHT,
        completed=MAX_IN_FLIGHT,
        completed_bytes=MAX_IN_FLIGHT * 200_000,
    )
    player.words.tell("all came")


async def send_ahead(player: Player) -> None:
    sends = [player.send(tag, numbers(2000, seed=tag)) for tag in range(2)]
    await asyncio.sleep(0.05)  # for them to reach the other side
    player.words.tell("sent")
    await asyncio.gather(*sends)
    await player.words.hears("all came")


async def recv_late(player: Player) -> None:
    await player.words.hears("sent")
    for tag in range(2):
        await player.recv_equal(tag, numbers(2000, seed=tag))
    player.words.tell("all came")


async def send_in_another_order(player: Player) -> None:
    for tag in (2, 0, 1):
        await player.send(tag, numbers(100, seed=tag))
        await player.words.hears(f"{tag} came")


async def recv_in_tag_order(player: Player) -> None:
    receives = [player.recv(tag, numbers(100)) for tag in range(3)]
    for tag in (2, 0, 1):
        assert torch.equal((await receives[tag]).cpu(), numbers(100, seed=tag))
        player.words.tell(f"{tag} came")


async def stay_until_told(player: Player) -> None:
    await player.words.hears("leave")


async def recv_what_is_not_sent(player: Player) -> None:
    receives = [player.recv(tag, numbers(10)) for tag in (7, 8)]
    for receive in receives:
        with pytest.raises(Timeout, match=r"tensor 7 did not come from stage 0 within [\d.]+ s"):
            await receive
    with pytest.raises(Timeout, match="tensor 7"):
        player.recv(9, numbers(10))
    player.words.tell("leave")


async def send_and_leave(player: Player) -> None:
    await player.words.hears("posted")
    await player.send(0, numbers(1_000_000))
    await player.link.close()


async def recv_until_the_peer_leaves(player: Player) -> None:
    first = player.recv(0, numbers(1_000_000))
    player.words.tell("posted")
    assert torch.equal((await first).cpu(), numbers(1_000_000))
    with pytest.raises(Broken, match="stage 0"):
        await player.recv(1, numbers(1))


async def recv_and_close(player: Player) -> None:
    receives = [player.recv(tag, numbers(10)) for tag in (0, 1)]
    await player.link.close()
    for receive in receives:
        with pytest.raises(Closed, match="the link to stage 0 was closed"):
            await receive
    with pytest.raises(Closed):
        player.recv(2, numbers(10))
    await player.link.close()
    player.words.tell("leave")


async def cancel_a_receive(player: Player) -> None:
    cancelled = player.recv(0, numbers(2000))
    cancelled.cancel()
    player.words.tell("sent")
    await player.recv_equal(1, numbers(2000, seed=1))
    player.words.tell("all came")


async def send_to_a_cancelled_receive(player: Player) -> None:
    await player.words.hears("sent")
    await asyncio.gather(*(player.send(tag, numbers(2000, seed=tag)) for tag in range(2)))
    await player.words.hears("all came")


async def send_without_end(player: Player) -> None:
    with contextlib.suppress(AsyncPipeError):
        for tag in range(1_000_000):
            await player.send(tag, LARGE)


async def recv_without_end(player: Player) -> None:
    with contextlib.suppress(AsyncPipeError):
        for tag in range(1_000_000):
            await player.recv(tag, LARGE)


PLAYS: dict[str, dict[str, Part]] = {
    "many kinds": {"sender": send_many_kinds, "receiver": recv_many_kinds},
    "at once": {"sender": send_when_receives_are_posted, "receiver": recv_all_at_once},
    "sent ahead": {"sender": send_ahead, "receiver": recv_late},
    "any order": {"sender": send_in_another_order, "receiver": recv_in_tag_order},
    "not sent": {"sender": stay_until_told, "receiver": recv_what_is_not_sent},
    "sender leaves": {"sender": send_and_leave, "receiver": recv_until_the_peer_leaves},
    "receiver closes": {"sender": stay_until_told, "receiver": recv_and_close},
    "cancelled": {"sender": send_to_a_cancelled_receive, "receiver": cancel_a_receive},
    "without end": {"sender": send_without_end, "receiver": recv_without_end},
}

# --- how ends meet ---


@dataclass(frozen=True)
class Table:
    """What the ends of a link have in common."""

    kind: LinkKind = LinkKind.GLOO
    device: str = "cpu"
    timeout_s: float = 5.0


async def meet(end: str, words: Words, table: Table) -> TensorLink:
    device = torch.device(table.device)
    if end == "receiver":
        hosting = await host(
            table.kind,
            address_ip=IP,
            epoch=EPOCH,
            peer=NAMES["sender"],
            device=device,
            timeout_s=table.timeout_s,
            max_in_flight=MAX_IN_FLIGHT,
        )
        words.tell(msgspec.json.encode(hosting.offer).decode())
        return await hosting.joined()
    offer = msgspec.json.decode(await words.hear(), type=LinkOffer)
    peer = NAMES["receiver"]
    return await join(offer, peer=peer, device=device, timeout_s=table.timeout_s, max_in_flight=MAX_IN_FLIGHT)


@contextlib.asynccontextmanager
async def conversation() -> AsyncIterator[tuple[Words, Words]]:
    ours, theirs = socket.socketpair()
    async with Words(ours) as here, Words(theirs) as there:
        yield here, there


@contextlib.asynccontextmanager
async def pair(table: Table) -> AsyncIterator[tuple[TensorLink, TensorLink]]:
    """The sender's end and the receiver's, in this process."""
    async with conversation() as (here, there):
        sender, receiver = await asyncio.gather(meet("sender", here, table), meet("receiver", there, table))
        try:
            yield sender, receiver
        finally:
            await asyncio.gather(sender.close(), receiver.close())


@contextlib.asynccontextmanager
async def port_pair(timeout_s: float) -> AsyncIterator[tuple[TensorLink, TensorLink]]:
    """The same over ZeroMQ."""
    async with ActorSystem("stage-0") as a, ActorSystem("stage-1") as b:
        ports = [TensorPort(timeout_s=60.0) for _ in range(2)]
        a.spawn(lambda: ports[0], name="port")
        b.spawn(lambda: ports[1], name="port")
        await asyncio.sleep(0)
        ports[0].connect(await a.connect(await b.listen("ipc://@" + os.urandom(8).hex()), actor="port"))
        ports[1].connect(await b.connect(await a.listen("ipc://@" + os.urandom(8).hex()), actor="port"))
        yield (
            PortLink(ports[0], a, peer=NAMES["receiver"], timeout_s=timeout_s),
            PortLink(ports[1], b, peer=NAMES["sender"], timeout_s=timeout_s),
        )


async def perform(play: str, links: tuple[TensorLink, TensorLink]) -> None:
    """Both parts, in this process."""
    async with conversation() as (here, there):
        cpu = torch.device("cpu")
        await asyncio.gather(
            PLAYS[play]["sender"](Player(links[0], here, cpu)), PLAYS[play]["receiver"](Player(links[1], there, cpu))
        )


@contextlib.asynccontextmanager
async def child(
    play: str, end: str, table: Table, env: dict[str, str] | None = None
) -> AsyncIterator[tuple[subprocess.Popen[bytes], Words]]:
    """A process that plays `end`, and our end of the conversation with it."""
    ours, theirs = socket.socketpair()
    with theirs:
        arguments = [play, end, str(table.kind), table.device, str(table.timeout_s), str(theirs.fileno())]
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "tests.contract.link_peers", *arguments],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
        )
    try:
        async with Words(ours) as words:
            await words.hears("here")
            yield process, words
    finally:
        process.kill()
        process.wait()


async def perform_with_child(play: str, child_end: str, table: Table, env: dict[str, str] | None = None) -> None:
    """Both parts, one of them in a process of its own, whose failure is ours."""
    end = "sender" if child_end == "receiver" else "receiver"
    async with child(play, child_end, table, env) as (process, words):
        await play_part(play, end, words, table)
        assert await asyncio.to_thread(process.wait, 10) == 0


async def play_part(play: str, end: str, words: Words, table: Table) -> None:
    link = await meet(end, words, table)
    try:
        await PLAYS[play][end](Player(link, words, torch.device(table.device)))
    finally:
        await link.close()


class PortLink(TensorLink):
    """A tensor link over ZeroMQ: a thin cover of a TensorPort, whose own deadline is never reached."""

    def __init__(self, port: TensorPort, system: ActorSystem, *, peer: str, timeout_s: float) -> None:
        self._port = port
        self._system = system
        self._peer = peer
        self._in_flight = InFlight(timeout_s=timeout_s, max_in_flight=MAX_IN_FLIGHT, on_failure=lambda: None)

    def send(self, tag: int, tensor: torch.Tensor, *, after: torch.cuda.Event | None = None) -> asyncio.Future[None]:
        late = f"tensor {tag} was not taken by {self._peer}"
        sent: asyncio.Future[None] = self._in_flight.begin(tag, num_bytes=tensor.nbytes, late=late)
        self._port.send(tag, to_wire(tensor)).add_done_callback(lambda done: self._settle(tag, done))
        return sent

    def recv(self, tag: int, *, shape: tuple[int, ...], dtype: torch.dtype) -> asyncio.Future[torch.Tensor]:
        late = f"tensor {tag} did not come from {self._peer}"
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        arrived: asyncio.Future[torch.Tensor] = self._in_flight.begin(tag, num_bytes=num_bytes, late=late)
        self._port.recv(tag).add_done_callback(lambda done: self._settle(tag, done))
        return arrived

    async def close(self) -> None:
        self._in_flight.fail(Closed(f"the link to {self._peer} was closed"))
        await self._system.stop(self._port.ref, timeout=1.0)

    def statistics(self) -> TransferStatistics:
        return self._in_flight.statistics()

    def _settle(self, tag: int, done: asyncio.Future[Any]) -> None:
        if (error := done.exception()) is not None:
            self._in_flight.fail(Broken(f"the link to {self._peer} broke: {error}"))
            return
        wired: Tensor | None = done.result()
        self._in_flight.finish(tag, None if wired is None else from_wire(wired))


def main() -> None:
    play, end, kind, device, timeout_s, fd = sys.argv[1:]

    async def part() -> None:
        async with Words(socket.socket(fileno=int(fd))) as words:
            words.tell("here")  # importing torch took its time
            await play_part(play, end, words, Table(LinkKind(kind), device, float(timeout_s)))

    run(part(), timeout_s=60)


if __name__ == "__main__":
    main()
