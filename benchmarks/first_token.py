"""The first token of prompts that are computed in parts on several stages, beside that of whole ones.

    python benchmarks/first_token.py
    python benchmarks/first_token.py --quick --json

OPT-125m's shape on two stages of one thread, and simulated stages whose step takes 4 ms and 0.2 ms a token; in turn on the
same workers. `ratio_int8_n2_1x128` is the time to the first token of a prompt of 128 tokens computed whole (up to 512 tokens at
once) over that of one in parts, and `8x128` the time to the last first token of eight prompts that come together.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from random_model import OPT_125M, make_large_model
from report import in_turn, median_ratio, print_result

from asyncpipe import Client, connect
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.tuning import Tuner
from asyncpipe_coordinator.service import Service

SIMULATED = "sim:layer_ms=1,prefill_us_per_token=50,layers={}"  # four layers a stage
LOADS = ((1, 128), (1, 1024), (8, 128))  # prompts that come together, tokens of each

Part = Callable[..., int]


@contextmanager
def cut(part: Part) -> Iterator[None]:
    """As `part` says."""
    usual, Tuner.part = Tuner.part, part  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tuner.part = usual  # type: ignore[method-assign]


WAYS: dict[str, Part] = {"whole": lambda tuner, num_tokens, *, most: min(num_tokens, most), "parts": Tuner.part}


@asynccontextmanager
async def serving(path: Path, name: str) -> AsyncIterator[Client]:
    form, num_stages = name.split("_n")
    stages = int(num_stages)
    config = ServiceConfig(
        checkpoint=path,
        quantize="int8" if form == "int8" else None,
        device=SIMULATED.format(4 * stages) if form == "sim" else "cpu",
        num_stages=stages,
        threads_per_stage=1,
        max_sequences=16,
        offload_dir=path.parent,
    )
    async with Service.open(config) as service, connect(await service.listen(f"memory://{name}")) as client:
        yield client


async def first_tokens_ms(client: Client, num_prompts: int, length: int, part: Part) -> float:
    """Of prompts that come together, the last one's."""
    prompts = [[4 + (num_prompts * place + row) % 1000 for place in range(length)] for row in range(num_prompts)]
    with cut(part):
        start_s = time.perf_counter()
        await asyncio.gather(*(client.generate(prompt, max_new_tokens=1) for prompt in prompts))
        seconds = time.perf_counter() - start_s
        await client.generate(prompts[0], max_new_tokens=4, ignore_eos=True)  # both kinds of steps are measured
    return 1000 * seconds


async def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    make_large_model(path, OPT_125M)
    names = ["int8_n2", "sim_n4"] if arguments.quick else ["fp32_n2", "int8_n2", "sim_n2", "sim_n4", "sim_n8"]
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(serving(path, name)) for name in names}
        for client in clients.values():
            await client.generate([5] * 64, max_new_tokens=4, ignore_eos=True)
        rounds = {
            f"{name}_{num_prompts}x{length}": {
                way: partial(first_tokens_ms, client, num_prompts, length, part) for way, part in WAYS.items()
            }
            for name, client in clients.items()
            for num_prompts, length in LOADS
        }
        results = await in_turn(rounds, 3 if arguments.quick else 7)
    result: dict[str, Any] = {}
    for case, measured in results.items():
        for way, values in measured.items():
            result[f"{way}_{case}_ms"] = round(statistics.median(values), 1)
        result[f"ratio_{case}"] = median_ratio(measured["whole"], measured["parts"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="int8, and four simulated stages: about a minute")
    parser.add_argument("--json", action="store_true", help="print medians and ratios as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(run(arguments, Path(folder) / "opt-125m"))
    print_result(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
