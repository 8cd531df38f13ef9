"""How much of the ideal a pipeline of simulated stages reaches: real processes, sockets and messages; layers only take time.

    python benchmarks/efficiency.py --stages 8
    python benchmarks/efficiency.py --stages 4 --uneven --link-ms 5 --json

`efficiency` is `ideal_s` over `measured_s`: the makespan that the same steps with the same stage times have when nothing else
takes time and no stage ever waits for a micro-batch to come back, over the measured one. More sequences decode than fit;
the figures are of a window that begins when the number of micro-batches has settled.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import uvloop
from report import print_result
from served import Served, served

from asyncpipe import Client
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.core.limits import Schedule

STAGE_MS = 10.0
UNEVEN = 1.2  # every second stage takes so much longer
START_TIMEOUT_S = 60.0
SETTLED_AFTER = 5  # equal readings
NEW_TOKENS = 4000  # more than the window takes


def serving(arguments: argparse.Namespace) -> AbstractAsyncContextManager[Served]:
    """A coordinator process with its workers: a client of it, and its pid. Layers take a tenth of a stage's time, so that an
    uneven pipeline is an uneven split."""
    split = [round(10 * (UNEVEN if arguments.uneven and stage % 2 else 1)) for stage in range(arguments.stages)]
    device = (
        f"sim:layer_ms={STAGE_MS / 10},layers={sum(split)},link_ms={arguments.link_ms}"
        f",jitter={arguments.jitter},hidden_size={arguments.hidden_size}"
    )
    flags = ["--stages", str(arguments.stages), "--split", ",".join(map(str, split)), "--device", device]
    flags += ["--max-sequences", str(arguments.sequences), "--schedule", arguments.schedule]
    if arguments.micro_batches:
        flags += ["--micro-batches", str(arguments.micro_batches)]
    return served(*flags)


async def decode(client: Client, count: int, new_tokens: int) -> None:
    """`count` sequences of `new_tokens` tokens, all at once."""
    prompts = [[5 + number % 900, 7, number // 900] for number in range(count)]
    await asyncio.gather(*(client.generate(prompt, max_new_tokens=new_tokens, timeout_s=600) for prompt in prompts))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one pipeline."""
    window_s = arguments.seconds or (8.0 if arguments.quick else 30.0)
    async with serving(arguments) as (client, pid, _):
        count = arguments.sequences * (4 * arguments.stages + 8)
        load = asyncio.ensure_future(decode(client, count, NEW_TOKENS))
        await settled(client)
        before = await client.status()
        start_s, start_cpu_s = time.perf_counter(), cpu_s(pid)
        await asyncio.sleep(window_s)
        after = await client.status()
        seconds, used_s = time.perf_counter() - start_s, cpu_s(pid) - start_cpu_s
        load.cancel()
        await asyncio.wait({load}, timeout=START_TIMEOUT_S)
        return report(before, after, seconds=seconds, coordinator_cpu_s=used_s)


async def settled(client: Client) -> None:
    """Until the number of micro-batches has not changed for a while."""
    history: list[int] = []
    while len(history) < SETTLED_AFTER or len(set(history[-SETTLED_AFTER:])) > 1:
        await asyncio.sleep(0.5)
        status = await client.status()
        if status.pipeline.steps > 8 * len(status.stages):
            history.append(status.pipeline.num_micro_batches)
        if len(history) > 40:  # it never settles: then any moment is as good
            return


def report(before: Status, after: Status, *, seconds: float, coordinator_cpu_s: float) -> dict[str, Any]:
    ideal_s = after.pipeline.ideal_s - before.pipeline.ideal_s
    measured_s = after.pipeline.measured_s - before.pipeline.measured_s
    steps = after.pipeline.steps - before.pipeline.steps
    return {
        "efficiency": round(ideal_s / measured_s, 4),
        "ideal_s": round(ideal_s, 4),
        "measured_s": round(measured_s, 4),
        "micro_batches": after.pipeline.num_micro_batches,
        "steps": steps,
        "tokens_per_s": round((after.generated_tokens - before.generated_tokens) / seconds, 1),
        "coordinator_cpu_share": round(coordinator_cpu_s / seconds, 4),
        "coordinator_cpu_ms_per_step": round(1000 * coordinator_cpu_s / steps, 4),
        "overhead_ms": round(1000 * after.pipeline.overhead_s, 3),
    }


def cpu_s(pid: int) -> float:
    """User and system time of a process; its workers are processes of their own."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="simulated stages of 10 ms (default: 4)")
    parser.add_argument("--uneven", action="store_true", help="every second stage takes 20 %% longer")
    parser.add_argument("--link-ms", type=float, default=0.0, help="delay of every link (default: 0)")
    parser.add_argument("--jitter", type=float, default=0.0, help="relative deviation of stage times (default: 0)")
    parser.add_argument("--hidden-size", type=int, default=0, help="float32 values a token between stages (default: 0)")
    parser.add_argument("--sequences", type=int, default=4, help="in each micro-batch (default: 4)")
    parser.add_argument("--micro-batches", type=int, help="default: automatic")
    parser.add_argument("--schedule", default="continuous", choices=[schedule.value for schedule in Schedule])
    parser.add_argument("--seconds", type=float, help="of the measured window (default: 30, quick: 8)")
    parser.add_argument("--quick", action="store_true", help="a shorter window: under 60 s")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    names = {"stages": arguments.stages, "uneven": arguments.uneven, "link_ms": arguments.link_ms}
    result = names | uvloop.run(measure(arguments))
    print_result(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
