"""One stage that takes several decode steps at once, beside one that takes them one by one.

    python benchmarks/multi_step.py
    python benchmarks/multi_step.py --quick --json

A random model of OPT-125m's shape; generated tokens per second, in turn on the same worker. `ratio_int8_b1` is several steps at
once over one by one, for one sequence in int8, and so on. `between_ms` is the part of a step's time in which the stage does not
compute: the turn through the coordinator.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from random_model import Shape, make_large_model
from report import in_turn, print_result

from asyncpipe import Client, connect
from asyncpipe.cores import find_cores
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core import tuning
from asyncpipe_coordinator.service import Service

OPT_125M = Shape(hidden=768, layers=12, vocab=50272)
PROMPT_LEN = 32
MAX_BATCH = 32


@contextmanager
def at_once(seconds: float) -> Iterator[None]:
    """So many seconds of steps are taken at once."""
    usual, tuning.AT_ONCE_S = tuning.AT_ONCE_S, seconds
    try:
        yield
    finally:
        tuning.AT_ONCE_S = usual


@asynccontextmanager
async def serving(path: Path, *, quantize: str | None, threads: int) -> AsyncIterator[Client]:
    config = ServiceConfig(
        checkpoint=path, quantize=quantize, threads_per_stage=threads, max_sequences=MAX_BATCH, offload_dir=path.parent
    )
    async with Service.open(config) as service, connect(await service.listen(f"memory://{quantize}")) as client:
        yield client


@dataclass
class Way:
    """To issue steps. `between_ms` is of each load, the first of which does not count."""

    at_once_s: float
    between_ms: list[float] = field(default_factory=list)

    async def tokens_per_s(self, client: Client, batch: int, new_tokens: int) -> float:
        prompts = [[4 + (batch * row + place) % 1000 for place in range(PROMPT_LEN)] for row in range(batch)]
        before, start_s = await client.status(), time.perf_counter()
        with at_once(self.at_once_s):
            await asyncio.gather(*(client.generate(p, max_new_tokens=new_tokens, ignore_eos=True) for p in prompts))
        seconds, after = time.perf_counter() - start_s, await client.status()
        steps, idle_s = after.pipeline.steps - before.pipeline.steps, _idle_s(after) - _idle_s(before)
        self.between_ms.append(1000 * idle_s / steps)
        return batch * new_tokens / seconds


def _idle_s(status: Status) -> float:
    return status.pipeline.measured_s - status.stages[0].busy_s


async def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    make_large_model(path, OPT_125M)
    forms = {"int8": "int8"} if arguments.quick else {"fp32": None, "int8": "int8", "int4": "int4"}
    batches = (1, 8) if arguments.quick else (1, 8, MAX_BATCH)
    new_tokens = 64 if arguments.quick else 128
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(serving(path, quantize=form, threads=arguments.threads))
            for name, form in forms.items()
        }
        cases = {f"{name}_b{batch}": (client, batch) for name, client in clients.items() for batch in batches}
        ways = {case: {"single": Way(0.0), "multi": Way(tuning.AT_ONCE_S)} for case in cases}
        rounds = {
            case: {name: partial(way.tokens_per_s, *cases[case], new_tokens) for name, way in both.items()}
            for case, both in ways.items()
        }
        results = await in_turn(rounds, 3 if arguments.quick else 7)
    result: dict[str, Any] = {}
    for case, measured in results.items():
        for name, values in measured.items():
            result[f"{name}_{case}_tokens_per_s"] = round(statistics.median(values), 1)
            result[f"{name}_{case}_between_ms"] = round(statistics.median(ways[case][name].between_ms[1:]), 2)
        pairs = zip(measured["single"], measured["multi"], strict=True)
        result[f"ratio_{case}"] = round(statistics.median(multi / single for single, multi in pairs), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=find_cores().count, help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="int8 at batch 1 and 8: under 60 s")
    parser.add_argument("--json", action="store_true", help="print medians and ratios as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(run(arguments, Path(folder) / "opt-125m"))
    print_result(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
