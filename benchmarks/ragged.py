"""Ragged load on a real model: continuous batching beside static padded batches, two stages beside one process, interleaved.

    python benchmarks/ragged.py
    python benchmarks/ragged.py --quick --json

64 requests with prompts of 4 to 400 tokens and outputs of 1 to 200, all at once, on a random OPT. `ratio_static` is useful
tokens per second (generated, padding not counted) of two one-thread stages over the same with `--static`; `two_stage_ratio` is
two one-thread stages over one process with two threads and the same number of sequences in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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
from tqdm import tqdm

from asyncpipe import Client, connect
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.service import Service

SEQUENCES = 16  # in flight: in two micro-batches on two stages, in one on one


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
async def serving(path: Path, *, stages: int, schedule: Schedule, micro_batches: int | None) -> AsyncIterator[Client]:
    config = ServiceConfig(
        checkpoint=path,
        num_stages=stages,
        threads_per_stage=2 // stages,
        num_micro_batches=micro_batches,
        max_sequences=SEQUENCES // stages,
        schedule=schedule,
    )
    async with Service.open(config) as service, connect(await service.listen(f"memory://{stages}{schedule}")) as client:
        yield client


async def tokens_per_s(client: Client, load: list[Request]) -> float:
    start_s = time.perf_counter()
    await asyncio.gather(
        *(client.generate(prompt, max_new_tokens=count, ignore_eos=True, timeout_s=600) for prompt, count in load)
    )
    return sum(request.new_tokens for request in load) / (time.perf_counter() - start_s)


async def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    vocab_size = make_model(path, quick=arguments.quick)
    load = ragged_load(64, vocab_size=vocab_size, scale=0.5 if arguments.quick else 1.0)
    repeats = arguments.repeats or (2 if arguments.quick else 5)
    names = ("continuous", "static", "one_process")
    rates: dict[str, list[float]] = {name: [] for name in names}
    async with AsyncExitStack() as stack:
        continuous, static = Schedule.CONTINUOUS, Schedule.STATIC
        clients = {
            "continuous": await stack.enter_async_context(serving(path, stages=2, schedule=continuous, micro_batches=None)),
            "static": await stack.enter_async_context(serving(path, stages=2, schedule=static, micro_batches=2)),
            "one_process": await stack.enter_async_context(serving(path, stages=1, schedule=continuous, micro_batches=1)),
        }
        for name in names:  # warm up
            await tokens_per_s(clients[name], load[:8])
        for _ in tqdm(range(repeats), unit="round", disable=None):
            for name in names:
                rates[name].append(await tokens_per_s(clients[name], load))
        micro_batches = (await clients["continuous"].status()).pipeline.num_micro_batches
    return {
        **{f"{name}_tokens_per_s": round(statistics.median(rates[name]), 1) for name in names},
        "ratio_static": median_ratio(rates["continuous"], rates["static"]),
        "two_stage_ratio": median_ratio(rates["continuous"], rates["one_process"]),
        "micro_batches": micro_batches,
        "requests": len(load),
        "useful_tokens": sum(request.new_tokens for request in load),
        "cores": os.cpu_count(),
    }


def median_ratio(above: list[float], below: list[float]) -> float:
    """Of the ratios round by round."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="rounds (default: 5, quick: 2)")
    parser.add_argument("--quick", action="store_true", help="a smaller model, all lengths halved: under 60 s")
    parser.add_argument("--json", action="store_true", help="print the medians and the ratios as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(run(arguments, Path(folder)))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
