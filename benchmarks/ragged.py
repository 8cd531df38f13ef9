"""Ragged load on a real model: continuous batching beside static padded batches, two stages beside one process, interleaved.

    python benchmarks/ragged.py
    python benchmarks/ragged.py --quick --json

64 requests with prompts of 4 to 400 tokens and outputs of 1 to 200, all at once, on a random OPT. Rates are useful tokens per
second: generated ones, padding not counted. `ratio_static` is two one-thread stages with their defaults (micro-batches of at
most 32) over the same with `--static`; `two_stage_ratio` is the same two stages over one process with two threads and all 64
sequences in one batch, which is the best for it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from random_model import make_model
from report import median_ratio, print_result
from tqdm import tqdm

from asyncpipe import Client, connect
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.service import Service


class System(NamedTuple):
    """What is compared. All of them use two threads in total."""

    stages: int
    max_sequences: int
    schedule: Schedule = Schedule.CONTINUOUS
    micro_batches: int | None = None


SYSTEMS = {
    "two_stages": System(stages=2, max_sequences=32),
    "one_process": System(stages=1, max_sequences=64, micro_batches=1),
    "static": System(stages=2, max_sequences=32, schedule=Schedule.STATIC),
}


class Request(NamedTuple):
    prompt: list[int]
    new_tokens: int


def ragged_load(count: int, *, vocab_size: int, scale: float) -> list[Request]:
    """Lengths are uniform; `scale` shortens all of them."""
    rng = random.Random(0)
    return [
        Request(
            [rng.randrange(4, vocab_size) for _ in range(max(4, int(rng.randint(4, 400) * scale)))],
            max(1, int(rng.randint(1, 200) * scale)),
        )
        for _ in range(count)
    ]


@asynccontextmanager
async def serving(path: Path, system: System) -> AsyncIterator[Client]:
    config = ServiceConfig(
        checkpoint=path,
        num_stages=system.stages,
        threads_per_stage=2 // system.stages,
        num_micro_batches=system.micro_batches,
        max_sequences=system.max_sequences,
        schedule=system.schedule,
    )
    async with Service.open(config) as service, connect(await service.listen(f"memory://{id(system)}")) as client:
        yield client


async def tokens_per_s(client: Client, load: list[Request]) -> float:
    start_s = time.perf_counter()
    await asyncio.gather(
        *(client.generate(prompt, max_new_tokens=count, ignore_eos=True, timeout_s=600) for prompt, count in load)
    )
    return sum(request.new_tokens for request in load) / (time.perf_counter() - start_s)


async def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    vocab_size = make_model(path, quick=arguments.quick)
    load = ragged_load(64, vocab_size=vocab_size, scale=0.2 if arguments.quick else 1.0)
    repeats = arguments.repeats or (3 if arguments.quick else 5)
    rates: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(serving(path, system)) for name, system in SYSTEMS.items()}
        for client in clients.values():  # warm up
            await tokens_per_s(client, load[:8])
        for _ in tqdm(range(repeats), unit="round", disable=None):
            for name, client in clients.items():
                rates[name].append(await tokens_per_s(client, load))
        micro_batches = (await clients["two_stages"].status()).pipeline.num_micro_batches
    return {
        **{f"{name}_tokens_per_s": round(statistics.median(found), 1) for name, found in rates.items()},
        "ratio_static": median_ratio(rates["two_stages"], rates["static"]),
        "two_stage_ratio": median_ratio(rates["two_stages"], rates["one_process"]),
        "micro_batches": micro_batches,
        "requests": len(load),
        "useful_tokens": sum(request.new_tokens for request in load),
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="rounds (default: 5, quick: 3)")
    parser.add_argument("--quick", action="store_true", help="a smaller model, all lengths a fifth: under 60 s")
    parser.add_argument("--json", action="store_true", help="print the medians and the ratios as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(run(arguments, Path(folder)))
    print_result(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
