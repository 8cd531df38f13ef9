"""Two one-thread stages beside one process with two threads: same model, same prompts, same total batch, interleaved.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --quick --json
    python benchmarks/pipeline.py --batches 4,16 --quantize int8

The model is a random OPT, written to a temporary folder. `ratio_two_b8` is generated tokens per second of 8 sequences, two
stages over one, in two micro-batches of 4. For `ratio_chosen_b8` the coordinator chooses how many: one, where two stages keep
each other from the memory more than they gain by computing at the same time.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from flags import batch_sizes
from random_model import make_model
from report import in_turn, median_ratio, print_result

from asyncpipe import Client, connect
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service

THREADS = 2
PROMPT_LEN = 32


class Way(NamedTuple):
    """`num_micro_batches` of None: as many as the coordinator chooses."""

    num_stages: int
    num_micro_batches: int | None


WAYS = {"one": Way(1, 1), "two": Way(2, 2), "chosen": Way(2, None)}


@asynccontextmanager
async def serving(path: Path, way: Way, *, batch: int, quantize: str | None) -> AsyncIterator[Client]:
    """All of the batch is in flight."""
    config = ServiceConfig(
        checkpoint=path,
        num_stages=way.num_stages,
        threads_per_stage=THREADS // way.num_stages,
        num_micro_batches=way.num_micro_batches,
        max_sequences=-(-batch // (way.num_micro_batches or 1)),
        quantize=quantize,
        offload_dir=path.parent,
    )
    address = f"memory://{way.num_stages}-{way.num_micro_batches}-{batch}"
    async with Service.open(config) as service, connect(await service.listen(address)) as client:
        yield client


async def tokens_per_s(client: Client, prompts: list[list[int]], new_tokens: int) -> float:
    start_s = time.perf_counter()
    await asyncio.gather(*(client.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True) for prompt in prompts))
    return len(prompts) * new_tokens / (time.perf_counter() - start_s)


async def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    vocab = make_model(path, quick=arguments.quick)
    generator = random.Random(0)
    repeats, new_tokens = (3, 32) if arguments.quick else (7, 64)
    result: dict[str, Any] = {"new_tokens": new_tokens, "cores": os.cpu_count()}
    for batch in arguments.batches:
        prompts = [[generator.randrange(4, vocab) for _ in range(PROMPT_LEN)] for _ in range(batch)]
        async with AsyncExitStack() as stack:
            rounds = {}
            for name, way in WAYS.items():
                opening = serving(path, way, batch=batch, quantize=arguments.quantize)
                client = await stack.enter_async_context(opening)
                rounds[name] = partial(tokens_per_s, client, prompts, new_tokens)
            [measured] = (await in_turn({f"b{batch}": rounds}, repeats)).values()
        for name, rates in measured.items():
            result[f"{name}_b{batch}_tokens_per_s"] = round(statistics.median(rates), 1)
            if name != "one":
                result[f"ratio_{name}_b{batch}"] = median_ratio(rates, measured["one"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=batch_sizes, help="sequences in total (default: 2,8,32; quick: 16)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="default: float32")
    parser.add_argument("--quick", action="store_true", help="a smaller model, one batch, and fewer rounds: under 40 s")
    parser.add_argument("--json", action="store_true", help="print the medians and ratios as JSON")
    arguments = parser.parse_args()
    arguments.batches = arguments.batches or ([16] if arguments.quick else [2, 8, 32])
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(run(arguments, Path(folder) / "model"))
    print_result(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
