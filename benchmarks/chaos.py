"""What happens to requests when workers are killed and frozen under load: real processes, a real model, random victims.

    python benchmarks/chaos.py --faults 200
    python benchmarks/chaos.py --quick --json
    python benchmarks/chaos.py --stages 8 --device sim:layer_ms=2 --faults 50

Streams run all the time, greedy and seeded, each compared token by token with what an undisturbed pipeline gives. A fault is a
SIGKILL or a SIGSTOP of one stage's process, or of two at once; the next one comes when the pipeline has recovered.
`recovery_s` is from the fault to the first token that a client gets from the pipeline after it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import uvloop
from report import print_result
from served import Served, served
from tqdm import tqdm

from asyncpipe import AsyncPipeError, Client

RECOVERY_TIMEOUT_S = 60.0
POLL_S = 0.01
STREAMS = 8
PROMPTS = ("def ", "import os\n\n", "class Stack:\n    ", "for i in range(", "return ", "with open(")
KINDS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}


@dataclass(frozen=True)
class Request:
    prompt: str
    new_tokens: int
    temperature: float
    seed: int


def requests() -> list[Request]:
    """Of different lengths, half of them greedy."""
    return [
        Request(prompt, 60 + 30 * number, 0.8 * (number % 2), seed=number)
        for number, prompt in enumerate(prompt * (1 + extra) for extra in range(2) for prompt in PROMPTS)
    ]


@dataclass
class Load:
    """Streams without end, and what became of them."""

    client: Client
    expected: dict[Request, tuple[int, ...]]
    num_requests: int = 0
    failed: list[str] = field(default_factory=list)
    wrong_tokens: int = 0
    lost_tokens: int = 0
    has_token: asyncio.Event = field(default_factory=asyncio.Event)
    is_ending: bool = False

    async def run(self, worker: int) -> None:
        for request in itertools.islice(itertools.cycle(self.expected), worker, None):
            if self.is_ending:
                return
            self.num_requests += 1
            try:
                self._compare(request, await self._stream(request))
            except AsyncPipeError as error:
                self.failed.append(str(error))

    async def _stream(self, request: Request) -> tuple[int, ...]:
        token_ids = []
        async for piece in stream(self.client, request):
            self.has_token.set()
            self.lost_tokens += piece.index != len(token_ids)
            token_ids.append(piece.token_id)
        return tuple(token_ids)

    def _compare(self, request: Request, token_ids: tuple[int, ...]) -> None:
        expected = self.expected[request]
        self.lost_tokens += abs(len(expected) - len(token_ids))
        self.wrong_tokens += sum(found != right for found, right in zip(token_ids, expected, strict=False))


def stream(client: Client, request: Request) -> Any:
    return client.stream(
        request.prompt,
        max_new_tokens=request.new_tokens,
        temperature=request.temperature,
        seed=request.seed,
        ignore_eos=True,
        timeout_s=600,
    )


def serving(arguments: argparse.Namespace) -> contextlib.AbstractAsyncContextManager[Served]:
    options = [arguments.model] if arguments.model else []
    options += ["--stages", str(arguments.stages), "--spares", str(arguments.spares), "--device", arguments.device]
    options += ["--max-restarts", "1000000", "--threads-per-stage", "1", "--log-level", "error"]
    return served(*options, quiet=not arguments.verbose)


async def undisturbed(client: Client) -> dict[Request, tuple[int, ...]]:
    async def one(request: Request) -> tuple[int, ...]:
        return tuple([piece.token_id async for piece in stream(client, request)])

    wanted = requests()
    return dict(zip(wanted, await asyncio.gather(*map(one, wanted)), strict=True))


async def strike(client: Client, load: Load, rng: random.Random) -> tuple[str, float]:
    """A fault; returns its kind and the seconds until tokens come again."""
    before = await client.status()
    kind = rng.choice(list(KINDS))
    victims = rng.sample(before.stages, k=1 if rng.random() < 0.9 else min(2, len(before.stages)))
    struck_at_s = time.monotonic()
    for victim in victims:
        os.kill(victim.pid, KINDS[kind])
    async with asyncio.timeout(RECOVERY_TIMEOUT_S):
        while True:
            status = await client.status()
            if status.restarts > before.restarts and status.state == "running":
                break
            await asyncio.sleep(POLL_S)
        load.has_token.clear()
        await load.has_token.wait()
    return kind, time.monotonic() - struck_at_s


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(arguments.seed)
    num_faults = arguments.faults or (10 if arguments.quick else 200)
    recovery_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    async with serving(arguments) as (client, *_):
        load = Load(client, await undisturbed(client))
        streams = [asyncio.ensure_future(load.run(worker)) for worker in range(STREAMS)]
        for _ in tqdm(range(num_faults), desc="faults", file=sys.stderr, disable=arguments.json or None):
            await asyncio.sleep(rng.uniform(0.2, 0.6))
            kind, seconds = await strike(client, load, rng)
            recovery_s[kind].append(seconds)
        load.is_ending = True
        await asyncio.gather(*streams)
        status = await client.status()
    everything = [seconds for some in recovery_s.values() for seconds in some]
    return {
        "faults": num_faults,
        "stages": arguments.stages,
        "requests": load.num_requests,
        "failed_requests": len(load.failed),
        "first_failure": load.failed[0] if load.failed else "",
        "tokens": status.generated_tokens,
        "lost_tokens": load.lost_tokens,
        "wrong_tokens": load.wrong_tokens,
        "restarts": status.restarts,
        "recovery_p50_s": percentile(everything, 50),
        "recovery_p95_s": percentile(everything, 95),
        "recovery_max_s": percentile(everything, 100),
        **{f"{kind}_p50_s": percentile(some, 50) for kind, some in recovery_s.items()},
    }


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that so many per cent do not exceed; 0.0 for none."""
    if not values:
        return 0.0
    if percent == 50:
        return round(statistics.median(values), 3)
    ordered = sorted(values)
    return round(ordered[max(-(-len(ordered) * percent // 100) - 1, 0)], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint (default: the bundled model)")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--spares", type=int, default=2, help="processes that wait to replace a lost one (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or sim:layer_ms=2 (default: cpu)")
    parser.add_argument("--faults", type=int, help="default: 200, or 10 with --quick")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="10 faults, in under 60 s")
    parser.add_argument("--verbose", action="store_true", help="show the coordinator's log")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    print_result(uvloop.run(measure(arguments)), as_json=arguments.json)


if __name__ == "__main__":
    main()
