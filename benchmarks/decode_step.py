"""A stage's decode step replayed from a tape, beside the same step computed call by call, and with keys and values in float16.

    python benchmarks/decode_step.py
    python benchmarks/decode_step.py --model llama-1.1b --forms int8,int4 --json
    python benchmarks/decode_step.py --forms int8 --context 1024

One stage with random weights, sequences of 128 tokens and more, and nothing but the stage: no coordinator, no messages. All
ways in turn, each with a stage of its own; medians in milliseconds, and ratios round by round: `ratio` is the time call by call
over that from the tape, `ratio_half` the time from the tape over that with keys and values in float16, from a tape too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from flags import some_of
from one_stage import whole_model
from peer_cases import MODELS, PROMPT_LEN, THREADS, Model
from random_model import MoEShape
from report import in_turn, median_ratio, print_result

from asyncpipe.wire.messages import Chunk, Delta, Opened, Step
from asyncpipe_workers import decode_tape
from asyncpipe_workers.output import ArrivedStep
from asyncpipe_workers.stage_model import StageModel

MOE = Model("moe", MoEShape(2048, 3, 32, 4, 128, experts=128, chosen=8, expert_size=768, vocab=32_000), "bfloat16")
"""Three layers of Qwen 3 30B-A3B."""
SHAPES = MODELS | {MOE.name: MOE}

FORMS = ("fp32", "int8", "int4")
STEPS = 6  # of one turn
BATCHES = (1, 8, 32)
QUICK_BATCHES = (1, 8)
ROUNDS = 12
QUICK_ROUNDS = 4
MORE_TOKENS = 512  # than of the prompts
KV_BYTES = 4 << 30
WAYS = {"calls": (False, "float32"), "tape": (True, "float32"), "half": (True, "float16")}  # is taped, keys and values
FIRST_TOKEN_ID, LAST_TOKEN_ID = 10, 30_000


class Decoding:
    """A stage, and as many sequences as a batch has."""

    def __init__(self, path: Path, form: str, batch: int, context: int, *, is_taped: bool, kv_dtype: str) -> None:
        os.environ[decode_tape.SWITCH] = str(int(is_taped))
        plan = whole_model(
            path,
            None if form == "fp32" else form,
            max_context_len=context + MORE_TOKENS,
            max_sequences=batch,
            kv_bytes=KV_BYTES,
            kv_dtype=kv_dtype,
        )
        self._stage = StageModel.load(plan)
        self._number = 0
        rng = random.Random(0)
        prompts = [tuple(rng.randrange(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(context)) for _ in range(batch)]
        opened = tuple(Opened(n, prompt, context) for n, prompt in enumerate(prompts))
        chunks = tuple(Chunk(n, context) for n in range(batch))
        self._token_ids = self._step(Delta(opened=opened, chunks=chunks))

    def close(self) -> None:
        self._stage.close()

    async def milliseconds(self) -> float:
        """Of a step."""
        times = []
        for _ in range(STEPS):
            start_s = time.perf_counter()
            self._token_ids = self._step(Delta(token_ids=self._token_ids))
            times.append(time.perf_counter() - start_s)
        return 1000 * statistics.median(times)

    def _step(self, delta: Delta) -> tuple[int, ...]:
        self._number += 1
        (output,) = self._stage.compute([ArrivedStep(Step(epoch=1, micro_batch=0, step=self._number, delta=delta), 0)])
        return output.token_ids


def measure(path: Path, form: str, batch: int, context: int, rounds: int) -> Mapping[str, float]:
    ways = {
        name: Decoding(path, form, batch, context, is_taped=is_taped, kv_dtype=kv_dtype)
        for name, (is_taped, kv_dtype) in WAYS.items()
    }
    once = {name: partial(Decoding.milliseconds, way) for name, way in ways.items()}
    times = asyncio.run(in_turn({"": once}, rounds))[""]
    for way in ways.values():
        way.close()
    ratios = {"ratio": ("calls", "tape"), "ratio_half": ("tape", "half")}
    return {f"{name}_ms": round(statistics.median(each), 2) for name, each in times.items()} | {
        name: median_ratio(times[above], times[below]) for name, (above, below) in ratios.items()
    }


def results(
    path: Path, forms: list[str], batches: tuple[int, ...], context: int, rounds: int
) -> Iterator[tuple[str, Mapping[str, float]]]:
    for form in forms:
        for batch in batches:
            yield f"{form}_b{batch}", measure(path, form, batch, context, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m", choices=SHAPES, help="whose shape (default: opt-125m)")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of weights (default: {','.join(FORMS)})")
    parser.add_argument("--context", type=int, default=PROMPT_LEN, help=f"tokens of each prompt (default: {PROMPT_LEN})")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}; quick: {QUICK_ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="fewer of everything: under 60 s")
    parser.add_argument("--json", action="store_true", help="print medians and ratios as JSON")
    arguments = parser.parse_args()
    forms = some_of(parser, "--forms", arguments.forms, FORMS)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        SHAPES[arguments.model].make(path)
        batches, rounds = (QUICK_BATCHES, QUICK_ROUNDS) if arguments.quick else (BATCHES, ROUNDS)
        print_result(dict(results(path, forms, batches, arguments.context, arguments.rounds or rounds)), as_json=arguments.json)


if __name__ == "__main__":
    main()
