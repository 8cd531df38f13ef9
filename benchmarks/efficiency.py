"""How much of the ideal a pipeline of simulated stages reaches: real processes, sockets and messages; layers only take time.

    python benchmarks/efficiency.py --stages 8
    python benchmarks/efficiency.py --stages 4 --uneven --link-ms 5 --json

`efficiency` is `ideal_s` over `measured_s`: the makespan that the same steps with the same stage times have when nothing else
takes time and no stage ever waits for a micro-batch to come back, over the measured one. After a warm-up, in which the number
of micro-batches settles, each micro-batch is filled with sequences that decode side by side to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from typing import Any

import uvloop

from asyncpipe import Client, connect
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.model_files import BUNDLED_MODEL
from asyncpipe_coordinator.service import Service

STAGE_MS = 10.0
UNEVEN = 1.2  # every second stage takes so much longer
SEQUENCES = 4  # in a micro-batch
WARM_UP_TOKENS = 24


def config_of(
    arguments: argparse.Namespace, *, micro_batches: int | None = None, schedule: str = "continuous"
) -> ServiceConfig:
    """Layers of a tenth of a stage, so that an uneven pipeline is an uneven split."""
    split = tuple(round(10 * (UNEVEN if arguments.uneven and stage % 2 else 1)) for stage in range(arguments.stages))
    device = (
        f"sim:layer_ms={STAGE_MS / 10},layers={sum(split)},link_ms={arguments.link_ms}"
        f",jitter={arguments.jitter},hidden_size={arguments.hidden_size}"
    )
    return ServiceConfig(
        checkpoint=BUNDLED_MODEL,
        num_stages=arguments.stages,
        split=split,
        num_micro_batches=micro_batches,
        max_sequences=SEQUENCES,
        schedule=Schedule(schedule),
        device=device,
    )


async def decode(client: Client, count: int, new_tokens: int) -> None:
    """`count` sequences of `new_tokens` tokens, all at once."""
    prompts = [[5 + number % 900, 7, number // 900] for number in range(count)]
    await asyncio.gather(*(client.generate(prompt, max_new_tokens=new_tokens, timeout_s=600) for prompt in prompts))


async def measure(config: ServiceConfig, *, new_tokens: int) -> dict[str, Any]:
    """The figures of one pipeline."""
    async with Service.open(config) as service, connect(await service.listen("memory://bench")) as client:
        micro_batches = config.num_micro_batches or await settled(client, config)
        before = await client.status()
        start_s, start_cpu_s = time.perf_counter(), cpu_s()
        await decode(client, SEQUENCES * micro_batches, new_tokens)
        seconds, used_s = time.perf_counter() - start_s, cpu_s() - start_cpu_s
        figures = report(before, await client.status(), seconds=seconds, coordinator_cpu_s=used_s)
        return figures | {"micro_batches": micro_batches}


async def settled(client: Client, config: ServiceConfig) -> int:
    """The number of micro-batches that is chosen while more sequences wait than run."""
    count = SEQUENCES * (4 * config.num_stages + 4)
    load = asyncio.ensure_future(decode(client, count, WARM_UP_TOKENS))
    chosen = config.num_stages
    while not load.done():
        await asyncio.wait({load}, timeout=0.25)
        status = await client.status()
        if status.requests_waiting and status.pipeline.steps > 4 * config.num_stages:
            chosen = status.pipeline.num_micro_batches
    await load
    return chosen


def report(before: Status, after: Status, *, seconds: float, coordinator_cpu_s: float) -> dict[str, Any]:
    ideal_s = after.pipeline.ideal_s - before.pipeline.ideal_s
    measured_s = after.pipeline.measured_s - before.pipeline.measured_s
    steps = after.pipeline.steps - before.pipeline.steps
    return {
        "efficiency": round(ideal_s / measured_s, 4),
        "ideal_s": round(ideal_s, 4),
        "measured_s": round(measured_s, 4),
        "steps": steps,
        "tokens_per_s": round((after.generated_tokens - before.generated_tokens) / seconds, 1),
        "coordinator_cpu_share": round(coordinator_cpu_s / seconds, 4),
        "coordinator_cpu_ms_per_step": round(1000 * coordinator_cpu_s / steps, 4),
        "overhead_ms": round(1000 * after.pipeline.overhead_s, 3),
    }


def cpu_s() -> float:
    """Of this process, which is coordinator and client."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    new_tokens = arguments.new_tokens or max(2400 // (arguments.stages + 2), 24) // (2 if arguments.quick else 1)
    config = config_of(arguments, micro_batches=arguments.micro_batches, schedule=arguments.schedule)
    figures = await measure(config, new_tokens=new_tokens)
    return {"stages": arguments.stages, "uneven": arguments.uneven, "link_ms": arguments.link_ms, **figures}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="simulated stages of 10 ms (default: 4)")
    parser.add_argument("--uneven", action="store_true", help="every second stage takes 20 %% longer")
    parser.add_argument("--link-ms", type=float, default=0.0, help="delay of every link (default: 0)")
    parser.add_argument("--jitter", type=float, default=0.0, help="relative deviation of stage times (default: 0)")
    parser.add_argument("--hidden-size", type=int, default=0, help="float32 values a token between stages (default: 0)")
    parser.add_argument("--micro-batches", type=int, help="default: automatic")
    parser.add_argument("--schedule", default="continuous", choices=[schedule.value for schedule in Schedule])
    parser.add_argument("--new-tokens", type=int, help="for each sequence (default: about half a minute's)")
    parser.add_argument("--quick", action="store_true", help="fewer tokens: under 60 s")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    result = uvloop.run(run(arguments))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
