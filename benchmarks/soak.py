"""What a pipeline's processes keep while requests end in every way: memory, files, threads and shared memory over time.

    python benchmarks/soak.py --minutes 60
    python benchmarks/soak.py --quick --json

Clients finish their requests, sample several texts, leave in the middle of one, run into their timeout, ask for what is
refused, connect for one request and disconnect within it. `growth_kB_per_1000` is a process's private memory, in the last third
of the time less that in the second one, for a thousand requests: what is kept of each would show there. Files and threads are
the most of each third.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from report import print_result
from served import served
from tqdm import tqdm

from asyncpipe import AsyncPipeError, Client, connect

CLIENTS = 12
SAMPLES = 60
PROMPTS = ("def ", "import os\n\n", "class Stack:\n    ", "for i in range(", "return ", "with open(")
MINUTES, QUICK_MINUTES = 20.0, 0.8
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the kernel has it


class Held(NamedTuple):
    """By a process."""

    private_kB: int
    files: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> Held:
        place = Path(f"/proc/{pid}")
        sizes = (line.split() for line in (place / "smaps_rollup").read_text().splitlines()[1:])
        private = sum(int(words[1]) for words in sizes if words[0] in ("Private_Clean:", "Private_Dirty:"))
        return cls(private, len(list((place / "fd").iterdir())), len(list((place / "task").iterdir())))


@dataclass
class Load:
    """Requests without end, and how they ended."""

    client: Client
    address: str
    ends: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)

    async def run(self, number: int, until_s: float) -> None:
        rng = random.Random(number)
        ways: Mapping[str, Callable[[random.Random], Awaitable[None]]] = {
            "finished": self._finish,
            "sampled": self._sample,
            "left": self._leave,
            "timed out": self._time_out,
            "refused": self._be_refused,
            "disconnected": self._disconnect,
        }
        while time.monotonic() < until_s:
            way = rng.choices(list(ways), weights=(4, 2, 4, 1, 1, 1))[0]
            try:
                await ways[way](rng)
            except AsyncPipeError as error:
                self.unexpected.append(f"{way}: {error}")
            self.ends[way] += 1

    async def _finish(self, rng: random.Random) -> None:
        await self.client.generate(rng.choice(PROMPTS) * rng.randint(1, 20), max_new_tokens=rng.randint(1, 60), logprobs=2)

    async def _sample(self, rng: random.Random) -> None:
        seed = rng.randrange(1 << 30)
        await self.client.generate(rng.choice(PROMPTS), max_new_tokens=20, temperature=0.8, n=3, seed=seed, top_p=0.9)

    async def _leave(self, rng: random.Random, client: Client | None = None) -> None:
        num_left = rng.randint(0, 20)
        async with contextlib.aclosing((client or self.client).stream(rng.choice(PROMPTS), max_new_tokens=200)) as stream:
            async for piece in stream:
                if piece.index >= num_left:
                    return

    async def _time_out(self, rng: random.Random) -> None:
        with contextlib.suppress(TimeoutError):
            await self.client.generate(rng.choice(PROMPTS), max_new_tokens=500, ignore_eos=True, timeout_s=0.2)

    async def _be_refused(self, rng: random.Random) -> None:
        with contextlib.suppress(AsyncPipeError):
            await self.client.generate(rng.choice(PROMPTS) * 100_000)

    async def _disconnect(self, rng: random.Random) -> None:
        async with connect(self.address) as client:
            await self._leave(rng, client)


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = [arguments.model] if arguments.model else []
    options = ["--stages", str(arguments.stages), "--threads-per-stage", "1", "--log-level", "error"]
    seconds = 60 * (arguments.minutes or (QUICK_MINUTES if arguments.quick else MINUTES))
    async with served(*model, *options) as service:
        stages = (await service.client.status()).stages
        pids = {"coordinator": service.pid} | {f"stage {number}": stage.pid for number, stage in enumerate(stages)}
        load, until_s = Load(service.client, service.address), time.monotonic() + seconds
        before = shared_segments()
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(load.run(number, until_s))
            samples = await sampled(pids, load, seconds, quiet=arguments.json)
        left = len(shared_segments() - before)
    return {
        "requests": load.ends.total(),
        "ends": dict(load.ends),
        "unexpected": load.unexpected[:3],
        "shared_memory_left": left,
        **{who: summary([sample.requests for sample in samples], [sample.held[who] for sample in samples]) for who in pids},
    }


def shared_segments() -> set[Path]:
    return set(SHARED_MEMORY.iterdir())


class Sample(NamedTuple):
    requests: int
    held: Mapping[str, Held]


async def sampled(pids: Mapping[str, int], load: Load, seconds: float, *, quiet: bool) -> list[Sample]:
    """At even distances."""
    samples = []
    for _ in tqdm(range(SAMPLES), desc="soak", file=sys.stderr, disable=quiet or None):
        await asyncio.sleep(seconds / SAMPLES)
        samples.append(Sample(load.ends.total(), {who: Held.by(pid) for who, pid in pids.items()}))
    return samples


def summary(requests: Sequence[int], held: Sequence[Held]) -> dict[str, Any]:
    thirds = [slice(first, first + SAMPLES // 3) for first in range(0, SAMPLES, SAMPLES // 3)]
    memory_kB = [statistics.median(each.private_kB for each in held[third]) for third in thirds]
    num_between = statistics.median(requests[thirds[2]]) - statistics.median(requests[thirds[1]])
    return {
        "private_MB": [round(each / 1024, 1) for each in memory_kB],
        "growth_kB_per_1000": round(1000 * (memory_kB[2] - memory_kB[1]) / max(num_between, 1)),
        "files": [max(each.files for each in held[third]) for third in thirds],
        "threads": [max(each.threads for each in held[third]) for third in thirds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint (default: the bundled model)")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--minutes", type=float, help=f"default: {MINUTES:g}, or {QUICK_MINUTES} with --quick")
    parser.add_argument("--quick", action="store_true", help="under 60 s; memory still grows to what it needs in that time")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    print_result(uvloop.run(measure(arguments)), as_json=arguments.json)


if __name__ == "__main__":
    main()
