"""Hidden states from one stage to the next: a Gloo link beside messages, interleaved, in one run, between two processes.

    python benchmarks/links.py             # about two minutes
    python benchmarks/links.py --quick --json

As stages do it: the tensor is in the message, through shared memory and a socket of the machine, or through ZeroMQ's TCP on
loopback; beside a Gloo link the message says what is coming, and the receive is posted when it arrives. `alone` is the time
from sending one tensor to hearing that it is there; `ahead` is the rate of several under way at once. A tensor is there when
it is in the receiver's memory, ready to read, from messages as a view of what was received.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, ClassVar

import msgspec
import torch
import uvloop
from report import Once, in_turn, print_result

from asyncpipe.actors import Actor, ActorRef, ActorSystem
from asyncpipe.transport.base import LinkOptions
from asyncpipe.wire.messages import Message, Request
from asyncpipe.wire.tensors import Tensor
from asyncpipe_workers.links import Hosting, LinkKind, LinkOffer, TensorLink, host, join
from asyncpipe_workers.staging import from_wire, to_wire

KB, MB = 1000, 1000 * 1000
SIZES = {"0.2MB": 200 * KB, "1MB": MB, "4MB": 4 * MB, "16MB": 16 * MB, "64MB": 64 * MB}
AHEAD = 4
MAX_ARRIVING = 1000  # what was sent may not be there yet
BYTES_PER_ROUND = 512 * MB
TIMEOUT_S = 30.0
IP = "127.0.0.1"


class Offered(Message, frozen=True, kw_only=True):
    offer: LinkOffer


class GetOffer(Request[Offered], frozen=True, kw_only=True):
    """The receiver hosts a Gloo link."""


class There(Message, frozen=True, kw_only=True):
    """All that was announced is there."""


class Drain(Request[There], frozen=True, kw_only=True):
    """Answered when all that was told of before is there."""


class Hidden(Message, frozen=True, kw_only=True):
    """One tensor: in the message, or under `tag` over the link."""

    tag: int = 0
    num_bytes: int = 0
    tensor: Tensor | None = None


class Receiver(Actor):
    """The next stage."""

    receives: ClassVar[Any] = GetOffer | Drain | Hidden
    mailbox_capacity: ClassVar[int] = 64

    def __init__(self) -> None:
        self._hosting: Hosting | None = None
        self._link: TensorLink | None = None
        self._arriving: set[asyncio.Future[torch.Tensor]] = set()

    async def handle(self, message: GetOffer | Drain | Hidden) -> Message | None:
        match message:
            case GetOffer():
                self._hosting = await host(
                    LinkKind.GLOO, address_ip=IP, epoch=0, timeout_s=TIMEOUT_S, max_in_flight=MAX_ARRIVING
                )
                return Offered(offer=self._hosting.offer)
            case Drain():
                await asyncio.gather(*self._arriving)
                return There()
            case Hidden():
                await self._take(message)
        return None

    async def _take(self, message: Hidden) -> None:
        if message.tensor is not None:
            from_wire(message.tensor)
            return
        if self._link is None:
            assert self._hosting is not None
            self._link = await self._hosting.joined()
        arriving = self._link.recv(message.tag, shape=(message.num_bytes,), dtype=torch.uint8)
        self._arriving.add(arriving)
        arriving.add_done_callback(self._arriving.discard)


class InMessages:
    def __init__(self, ref: ActorRef) -> None:
        self._ref = ref

    async def alone(self, tensor: torch.Tensor, count: int) -> float:
        """Median microseconds."""
        times_s = []
        for _ in range(count):
            start_s = time.perf_counter()
            await self._ref.tell(Hidden(tensor=to_wire(tensor)), timeout=TIMEOUT_S)
            await self._ref.ask(Drain(), timeout=TIMEOUT_S)
            times_s.append(time.perf_counter() - start_s)
        return statistics.median(times_s) * 1e6

    async def ahead(self, tensor: torch.Tensor, count: int) -> float:
        """Bytes a second."""
        start_s = time.perf_counter()
        for _ in range(count):
            await self._ref.tell(Hidden(tensor=to_wire(tensor)), timeout=TIMEOUT_S)
        await self._ref.ask(Drain(), timeout=TIMEOUT_S)
        return tensor.nbytes * count / (time.perf_counter() - start_s)


class OverLink:
    def __init__(self, ref: ActorRef, link: TensorLink) -> None:
        self._ref = ref
        self._link = link
        self._tag = 0

    async def alone(self, tensor: torch.Tensor, count: int) -> float:
        times_s = []
        for _ in range(count):
            start_s = time.perf_counter()
            sent = await self._send(tensor)
            await self._ref.ask(Drain(), timeout=TIMEOUT_S)
            await sent
            times_s.append(time.perf_counter() - start_s)
        return statistics.median(times_s) * 1e6

    async def ahead(self, tensor: torch.Tensor, count: int) -> float:
        start_s = time.perf_counter()
        sends: deque[asyncio.Future[None]] = deque()
        for _ in range(count):
            if len(sends) == AHEAD:
                await sends.popleft()
            sends.append(await self._send(tensor))
        await self._ref.ask(Drain(), timeout=TIMEOUT_S)
        await asyncio.gather(*sends)
        return tensor.nbytes * count / (time.perf_counter() - start_s)

    async def _send(self, tensor: torch.Tensor) -> asyncio.Future[None]:
        self._tag += 1
        await self._ref.tell(Hidden(tag=self._tag, num_bytes=tensor.nbytes), timeout=TIMEOUT_S)
        return self._link.send(self._tag, tensor)


def plan(whos: dict[str, InMessages | OverLink], *, quick: bool) -> dict[str, dict[str, Once]]:
    """For each thing measured, who is measured: microseconds, or bytes a second."""
    rounds: dict[str, dict[str, Once]] = {}
    for size, num_bytes in SIZES.items():
        tensor = torch.zeros(num_bytes, dtype=torch.uint8)
        count = max(4, min(1000, BYTES_PER_ROUND // num_bytes // (4 if quick else 1)))
        rounds[f"alone {size}"] = {name: lambda w=who, t=tensor, c=count: w.alone(t, c) for name, who in whos.items()}  # type: ignore[misc]
        rounds[f"ahead {size}"] = {name: lambda w=who, t=tensor, c=count: w.ahead(t, c) for name, who in whos.items()}  # type: ignore[misc]
    return rounds


def summarize(results: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians, and of the rounds' ratios the median: how many times as fast as Gloo ZeroMQ is."""
    summary: dict[str, Any] = {"cores": os.cpu_count(), "torch": torch.__version__}
    for what, whos in results.items():
        is_time = what.startswith("alone")
        unit, scale = ("us", 1.0) if is_time else ("MB/s", 1e-6)
        for who, values in whos.items():
            summary[f"{what}, {who}, {unit}"] = round(statistics.median(values) * scale)
        for who in [who for who in whos if who != "gloo"]:
            pairs = zip(whos["gloo"], whos[who], strict=True)
            summary[f"{what}, {who} / gloo"] = round(statistics.median(a / b if is_time else b / a for a, b in pairs), 2)
    return summary


def systems() -> dict[str, tuple[str, LinkOptions]]:
    """How messages travel: an address to listen at, and options."""
    return {
        "shm": (f"ipc://@asyncpipe-links-{os.getpid()}", LinkOptions()),
        "tcp": (f"tcp://{IP}:0", LinkOptions(shared_memory=False)),
    }


async def serve() -> None:
    """The other process: a receiver for each way, until our input ends."""
    async with AsyncExitStack() as stack:
        addresses = {}
        for name, (address, options) in systems().items():
            system = await stack.enter_async_context(ActorSystem("receiver", options=options))
            system.spawn(Receiver, name="receiver")
            addresses[name] = await system.listen(address)
        print(msgspec.json.encode(addresses).decode(), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def receivers() -> AsyncIterator[dict[str, ActorRef]]:
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        addresses = json.loads(await asyncio.to_thread(process.stdout.readline))
        async with AsyncExitStack() as stack:
            refs = {}
            for name, (_, options) in systems().items():
                system = await stack.enter_async_context(ActorSystem("sender", options=options))
                refs[name] = await system.connect(addresses[name], actor="receiver")
            yield refs
    finally:
        process.kill()
        process.wait()


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    async with receivers() as refs:
        offered = await refs["shm"].ask(GetOffer(), timeout=TIMEOUT_S)
        joining = asyncio.ensure_future(join(offered.offer, timeout_s=TIMEOUT_S, max_in_flight=AHEAD))
        await refs["shm"].tell(Hidden(tag=0, num_bytes=1), timeout=TIMEOUT_S)  # the receiver joins, and is sent
        link = await joining
        await link.send(0, torch.zeros(1, dtype=torch.uint8))
        whos = {"gloo": OverLink(refs["shm"], link), "ipc shm": InMessages(refs["shm"]), "zmq tcp": InMessages(refs["tcp"])}
        results = await in_turn(plan(whos, quick=arguments.quick), repeats=3 if arguments.quick else 7)
        await link.close()
    return summarize(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 60 s")
    parser.add_argument("--json", action="store_true", help="print the medians and ratios as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve())
    else:
        print_result(uvloop.run(run(arguments)), as_json=arguments.json)


if __name__ == "__main__":
    main()
