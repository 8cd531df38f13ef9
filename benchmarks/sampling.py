"""Tokens chosen from logits, by the compiled kernel beside torch.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --quick --json

Rows of logits as models give them, some tokens likely and all others together likely too, and samplers with the parameters that
people set. Both ways in turn; medians in milliseconds a step, and `ratio`, torch's time over the kernel's, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peer_cases import PROMPT_LEN, THREADS
from report import in_turn, median_ratio, print_result

from asyncpipe.wire.messages import Sampling
from asyncpipe_workers import drawing
from asyncpipe_workers.sampling import Sampler, sample

VOCABULARIES = (32_000, 50_272, 128_256)  # of Llama 2, OPT, Llama 3
BATCHES = (1, 8, 32)
SETTINGS: Mapping[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "flat_top_p": {"temperature": 2.0, "top_p": 0.95},  # thousands of tokens
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalty": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
}
NUM_LIKELY, HOW_MUCH = 20, 10.0  # tokens that stand out, and by so much
REPEATS = 5  # of one turn
ROUNDS = 12
QUICK_ROUNDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=THREADS, help=f"default: {THREADS}")
    parser.add_argument("--quick", action="store_true", help="one vocabulary, fewer rounds: under 20 s")
    parser.add_argument("--json", action="store_true", help="print times and ratios as JSON")
    arguments = parser.parse_args()
    compiled = drawing.compiled_draw()
    if compiled is None:
        parser.exit(1, "no kernels are compiled here: there is nothing to compare\n")
    torch.set_num_threads(arguments.threads)
    vocabularies = VOCABULARIES[1:2] if arguments.quick else VOCABULARIES
    ways = {"torch": None, "compiled": compiled}

    async def step_ms(way: str, logits_RV: torch.Tensor, samplers: list[Sampler]) -> float:
        drawing.compiled_draw = lambda: ways[way]  # type: ignore[assignment]
        with torch.inference_mode():
            start_s = time.perf_counter()
            for _ in range(REPEATS):
                sample(logits_RV, samplers)
        return (time.perf_counter() - start_s) / REPEATS * 1e3

    rounds = {}
    for size in vocabularies:
        for batch in BATCHES:
            for name, options in SETTINGS.items():
                samplers = [
                    Sampler(Sampling(seed=row, **options), range(PROMPT_LEN), num_prompt=PROMPT_LEN) for row in range(batch)
                ]
                case = partial(step_ms, logits_RV=logits(batch, size), samplers=samplers)
                rounds[f"{name}_v{size}_b{batch}"] = {way: partial(case, way) for way in ways}
    found = asyncio.run(in_turn(rounds, QUICK_ROUNDS if arguments.quick else ROUNDS))
    result = {
        what: {f"{way}_ms": round(statistics.median(times), 3) for way, times in of.items()}
        | {"ratio": median_ratio(of["torch"], of["compiled"])}
        for what, of in found.items()
    }
    print_result(result, as_json=arguments.json)


def logits(batch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found_RV = torch.randn(batch, size, generator=generator) * 2.5
    likely_RN = torch.randint(size, (batch, NUM_LIKELY), generator=generator)
    return found_RV.scatter_add_(1, likely_RN, torch.full((batch, NUM_LIKELY), HOW_MUCH))


if __name__ == "__main__":
    main()
