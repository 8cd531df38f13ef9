"""Two one-thread stages beside one process with two threads: same model, same prompts, same total batch, interleaved.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --quick --json

The model is a random OPT, written to a temporary folder. `two_stage_ratio` is generated tokens per second, two stages over one.
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
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from random_model import make_model
from report import print_result
from tqdm import tqdm

from asyncpipe import Client, connect
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service


@dataclass(frozen=True)
class Work:
    """`batch` prompts of `prompt_len` tokens, each continued by `new_tokens`."""

    batch: int
    prompt_len: int
    new_tokens: int
    vocab_size: int

    def prompts(self) -> list[list[int]]:
        generator = random.Random(0)
        return [[generator.randrange(4, self.vocab_size) for _ in range(self.prompt_len)] for _ in range(self.batch)]


@asynccontextmanager
async def serving(path: Path, *, stages: int, threads: int, work: Work) -> AsyncIterator[Client]:
    """All of the batch is in flight: in one micro-batch on one stage, in `stages` smaller ones otherwise."""
    config = ServiceConfig(
        checkpoint=path,
        num_stages=stages,
        threads_per_stage=threads,
        num_micro_batches=stages,
        max_sequences=-(-work.batch // stages),
    )
    async with Service.open(config) as service, connect(await service.listen(f"memory://{stages}")) as client:
        yield client


async def tokens_per_s(client: Client, work: Work) -> float:
    start_s = time.perf_counter()
    await asyncio.gather(
        *(client.generate(prompt, max_new_tokens=work.new_tokens, ignore_eos=True) for prompt in work.prompts())
    )
    return work.batch * work.new_tokens / (time.perf_counter() - start_s)


async def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    vocab = make_model(path, quick=arguments.quick)
    work = Work(batch=arguments.batch, prompt_len=32, new_tokens=16 if arguments.quick else 32, vocab_size=vocab)
    repeats = 3 if arguments.quick else 7
    one: list[float] = []
    two: list[float] = []
    async with serving(path, stages=1, threads=2, work=work) as whole, serving(path, stages=2, threads=1, work=work) as cut:
        for repeat in tqdm(range(repeats + 1), unit="round", disable=None):
            for client, results in ((whole, one), (cut, two)):
                value = await tokens_per_s(client, work)
                if repeat:  # the first round warms up
                    results.append(value)
    return {
        "one_process_tokens_per_s": round(statistics.median(one), 1),
        "two_stages_tokens_per_s": round(statistics.median(two), 1),
        "two_stage_ratio": round(statistics.median(b / a for a, b in zip(one, two, strict=True)), 3),
        "batch": work.batch,
        "new_tokens": work.new_tokens,
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="sequences in total (default: 16)")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rounds: under 40 s")
    parser.add_argument("--json", action="store_true", help="print the medians and the ratio as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(run(arguments, Path(folder)))
    print_result(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
