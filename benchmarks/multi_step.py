"""Pipelines that take several decode steps at once, beside the same ones that take them one by one.

    python benchmarks/multi_step.py
    python benchmarks/multi_step.py --quick --json

A random model of OPT-125m's shape; generated tokens per second, in turn on the same workers. `ratio_int8_b1` is several steps
at once over one by one, for one sequence in int8, and so on; `int8_n2` has two stages, and in `far_n2` they only take 5 ms for
a step, and links 5 ms for a message. `between_ms` is what a step takes beyond its stages' computing: links, and the turn
through the coordinator; where micro-batches overlap it is negative.
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
from random_model import OPT_125M, make_large_model
from report import in_turn, median_ratio, print_result

from asyncpipe import Client, connect
from asyncpipe.cores import find_cores
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core import tuning
from asyncpipe_coordinator.service import Service

FAR_APART = "sim:layer_ms=0.83,link_ms=5,layers=12"
PROMPT_LEN = 32
NEW_TOKENS = 64
BATCHES = (1, 8)


@contextmanager
def at_once(seconds: float) -> Iterator[None]:
    """So many seconds of steps are taken at once, at the most."""
    usual = tuning.AT_ONCE_S, tuning.ALONE_S
    tuning.AT_ONCE_S, tuning.ALONE_S = (min(most_s, seconds) for most_s in usual)
    try:
        yield
    finally:
        tuning.AT_ONCE_S, tuning.ALONE_S = usual


@asynccontextmanager
async def serving(path: Path, name: str, threads: int) -> AsyncIterator[Client]:
    form, _, num_stages = name.partition("_n")
    stages = int(num_stages or 1)
    config = ServiceConfig(
        checkpoint=path,
        quantize=form if form in ("int8", "int4") else None,
        device=FAR_APART if form == "far" else "cpu",
        num_stages=stages,
        threads_per_stage=max(threads // stages, 1),
        max_sequences=max(BATCHES),
        offload_dir=path.parent,
    )
    async with Service.open(config) as service, connect(await service.listen(f"memory://{name}")) as client:
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
    return status.pipeline.measured_s - sum(stage.busy_s for stage in status.stages)


async def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    make_large_model(path, OPT_125M)
    names = ["int8", "int8_n2"] if arguments.quick else ["fp32", "int8", "int4", "fp32_n2", "int8_n2", "far_n2"]
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(serving(path, name, arguments.threads)) for name in names}
        cases = {f"{name}_b{batch}": (client, batch) for name, client in clients.items() for batch in BATCHES}
        ways = {case: {"single": Way(0.0), "multi": Way(1.0)} for case in cases}
        rounds = {
            case: {name: partial(way.tokens_per_s, *cases[case], NEW_TOKENS) for name, way in both.items()}
            for case, both in ways.items()
        }
        results = await in_turn(rounds, 3 if arguments.quick else 7)
    result: dict[str, Any] = {}
    for case, measured in results.items():
        for name, values in measured.items():
            result[f"{name}_{case}_tokens_per_s"] = round(statistics.median(values), 1)
            result[f"{name}_{case}_between_ms"] = round(statistics.median(ways[case][name].between_ms[1:]), 2)
        result[f"ratio_{case}"] = median_ratio(measured["multi"], measured["single"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=find_cores().count, help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="int8 at batch 1 and 8: about a minute")
    parser.add_argument("--json", action="store_true", help="print medians and ratios as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(run(arguments, Path(folder) / "opt-125m"))
    print_result(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
