"""The actor runtime beside what it is built on: raw pyzmq and Gloo, interleaved, in one run, between two processes.

    python benchmarks/actors.py            # about two minutes
    python benchmarks/actors.py --quick --json

Round trips: `ask` beside a `zmq.asyncio` DEALER and ROUTER. Transfers: a tensor counts as received when the receiver has it in
its memory, ready to read: for Gloo when `recv` returns, for us when the handler is called. We hand out a view of shared memory;
`copied` is the same with one copy more, into memory of the receiver's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np
import uvloop
import zmq
import zmq.asyncio
from report import Once, in_turn, median_ratio

from asyncpipe.actors import Actor, ActorRef, ActorSystem
from asyncpipe.wire.messages import Message, Request
from asyncpipe.wire.tensors import Tensor

KB, MB = 1024, 1024 * 1024
SIZES = {"1KB": KB, "64KB": 64 * KB, "1MB": MB, "8MB": 8 * MB, "64MB": 64 * MB}
BYTES_PER_ROUND = 256 * MB
TIMEOUT_S = 30.0


class Pong(Message, frozen=True, kw_only=True):
    value: int


class Ping(Request[Pong], frozen=True, kw_only=True):
    value: int


class Blob(Message, frozen=True, kw_only=True):
    tensor: Tensor
    copy: bool = False


class Peer(Actor):
    """In the other process: answers pings, takes tensors."""

    receives: ClassVar[Any] = Ping | Blob

    async def handle(self, message: Ping | Blob) -> Pong | None:
        if isinstance(message, Ping):
            return Pong(value=message.value)
        if message.copy:
            if not hasattr(self, "_own") or self._own.nbytes != message.tensor.nbytes:
                self._own = np.empty(message.tensor.shape, np.uint8)
            np.copyto(self._own, message.tensor.numpy())
        return None


class Ours:
    def __init__(self, ref: ActorRef) -> None:
        self._ref = ref

    async def round_trips(self, count: int) -> float:
        """Median microseconds of an ask."""
        times = []
        for value in range(count):
            start_s = time.perf_counter()
            await self._ref.ask(Ping(value=value), timeout=TIMEOUT_S)
            times.append(time.perf_counter() - start_s)
        return statistics.median(times) * 1e6

    async def tells(self, count: int) -> float:
        """Messages a second; the ask at the end is answered behind the last of them."""
        message = Blob(tensor=Tensor.from_numpy(np.zeros(64, np.uint8)))
        start_s = time.perf_counter()
        for _ in range(count):
            await self._ref.tell(message, timeout=TIMEOUT_S)
        await self._ref.ask(Ping(value=0), timeout=TIMEOUT_S)
        return count / (time.perf_counter() - start_s)

    async def transfer(self, array: np.ndarray[Any, Any], count: int, *, copy: bool) -> float:
        """Bytes a second."""
        start_s = time.perf_counter()
        for _ in range(count):
            await self._ref.tell(Blob(tensor=Tensor.from_numpy(array), copy=copy), timeout=TIMEOUT_S)
        await self._ref.ask(Ping(value=0), timeout=TIMEOUT_S)
        return array.nbytes * count / (time.perf_counter() - start_s)


class RawZmq:
    """A DEALER of zmq.asyncio; the ROUTER in the other process echoes messages that end with a last frame "echo"."""

    def __init__(self, address: str) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    async def round_trips(self, count: int) -> float:
        times = []
        for _ in range(count):
            start_s = time.perf_counter()
            await self._echo(b"x" * 30)
            times.append(time.perf_counter() - start_s)
        return statistics.median(times) * 1e6

    async def tells(self, count: int) -> float:
        start_s = time.perf_counter()
        for _ in range(count):
            await self._socket.send_multipart([b"x" * 30, b"y" * 64])
        await self._echo(b"")
        return count / (time.perf_counter() - start_s)

    async def transfer(self, array: np.ndarray[Any, Any], count: int) -> float:
        start_s = time.perf_counter()
        for _ in range(count):
            await self._socket.send_multipart([b"x" * 30, array.data], copy=False)
        await self._echo(b"")
        return array.nbytes * count / (time.perf_counter() - start_s)

    async def _echo(self, payload: bytes) -> None:
        await self._socket.send_multipart([payload, b"echo"])
        await asyncio.wait_for(self._socket.recv_multipart(), TIMEOUT_S)

    def close(self) -> None:
        self._socket.close()


async def raw_zmq_peer(address: str) -> None:
    socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    socket.bind(address)
    while True:
        frames = await socket.recv_multipart(copy=False)
        if frames[-1].bytes == b"echo":
            await socket.send_multipart(frames)


class Gloo:
    """Rank 0 of two; torch is imported only here. The other rank mirrors the calls."""

    def __init__(self, rendezvous: str, rank: int) -> None:
        import torch.distributed as dist

        self._dist = dist
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)

    async def transfer(self, num_bytes: int, count: int) -> float:
        import torch

        tensor, done = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
        self._dist.send(torch.tensor([num_bytes, count]), 1)
        self._dist.recv(done, 1)
        start_s = time.perf_counter()
        for _ in range(count):
            self._dist.send(tensor, 1)
        self._dist.recv(done, 1)
        return num_bytes * count / (time.perf_counter() - start_s)

    def mirror(self) -> None:
        import torch

        done, plan = torch.zeros(1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
        while True:
            self._dist.recv(plan, 0)
            num_bytes, count = plan.tolist()
            if count == 0:
                return
            tensor = torch.zeros(num_bytes, dtype=torch.uint8)
            self._dist.send(done, 0)
            for _ in range(count):
                self._dist.recv(tensor, 0)
            self._dist.send(done, 0)

    def close(self) -> None:
        import torch

        self._dist.send(torch.tensor([0, 0]), 1)
        self._dist.destroy_process_group()


def plan(ours: Ours, raw: RawZmq, gloo: Gloo, *, quick: bool) -> dict[str, dict[str, Once]]:
    """For each thing measured, who is measured: microseconds, messages/s or bytes/s."""
    asks, tells = (1000, 5000) if quick else (4000, 20_000)
    rounds: dict[str, dict[str, Once]] = {
        "round trip": {"ours": lambda: ours.round_trips(asks), "zmq.asyncio": lambda: raw.round_trips(asks)},
        "tell": {"ours": lambda: ours.tells(tells), "zmq.asyncio": lambda: raw.tells(tells)},
    }
    for name, num_bytes in SIZES.items():
        count = max(4, min(2000, BYTES_PER_ROUND // num_bytes // (4 if quick else 1)))
        array = np.zeros(num_bytes, np.uint8)
        rounds[f"transfer {name}"] = {
            "ours": lambda a=array, c=count: ours.transfer(a, c, copy=False),  # type: ignore[misc]
            "ours, copied": lambda a=array, c=count: ours.transfer(a, c, copy=True),  # type: ignore[misc]
            "zmq.asyncio": lambda a=array, c=count: raw.transfer(a, c),  # type: ignore[misc]
            "gloo": lambda n=num_bytes, c=count: gloo.transfer(n, c),  # type: ignore[misc]
        }
    return rounds


def summarize(results: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    medians = {what: {who: statistics.median(v) for who, v in whos.items()} for what, whos in results.items()}

    def ratio(what: str, ours: str, theirs: str) -> float:
        return median_ratio(results[what][ours], results[what][theirs])

    return {
        "medians": medians,
        "ask_ratio": ratio("round trip", "ours", "zmq.asyncio"),
        "tell_ratio": ratio("tell", "ours", "zmq.asyncio"),
        "bandwidth_ratio_8MB": ratio("transfer 8MB", "ours", "gloo"),
        "bandwidth_ratio_64MB": ratio("transfer 64MB", "ours", "gloo"),
        "bandwidth_ratio_8MB_copied": ratio("transfer 8MB", "ours, copied", "gloo"),
        "bandwidth_ratio_64MB_copied": ratio("transfer 64MB", "ours, copied", "gloo"),
        "cores": os.cpu_count(),
    }


def show(summary: dict[str, Any]) -> None:
    units = {"round trip": ("µs", 1.0), "tell": ("messages/s", 1.0)}
    for what, whos in summary["medians"].items():
        unit, scale = units.get(what, ("MB/s", 1e-6))
        print(f"{what:16}", "   ".join(f"{who} {value * scale:,.0f} {unit}" for who, value in whos.items()))
    for name, value in summary.items():
        if name.endswith(("ratio", "MB", "copied")):
            print(f"{name:28} {value:.2f}")


async def run(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    address = f"ipc://{folder}/raw"
    here = [sys.executable, __file__, "--peer"]
    peers = [subprocess.Popen([*here, "zmq", address]), subprocess.Popen([*here, "gloo", f"{folder}/gloo"])]
    try:
        gloo = Gloo(f"{folder}/gloo", rank=0)
        raw = RawZmq(address)
        async with ActorSystem("benchmark") as system:
            ours = Ours(await system.spawn_process("actors:Peer", name="peer"))
            rounds = plan(ours, raw, gloo, quick=arguments.quick)
            results = await in_turn(rounds, repeats=3 if arguments.quick else 7)
        raw.close()
        gloo.close()
        return summarize(results)
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()


def serve_peer(kind: str, where: str) -> None:
    if kind == "zmq":
        uvloop.run(raw_zmq_peer(where))
    else:
        with suppress(RuntimeError):  # rank 0 is gone
            Gloo(where, rank=1).mirror()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 40 s")
    parser.add_argument("--json", action="store_true", help="print the medians and ratios as JSON")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        serve_peer(*arguments.peer)
        return
    with tempfile.TemporaryDirectory() as folder:
        summary = uvloop.run(run(arguments, folder))
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary)


if __name__ == "__main__":
    main()
