"""A model larger than its memory: weights on disk, beside Hugging Face Accelerate, overlap on and off, and the disk itself.

    python benchmarks/offload.py
    python benchmarks/offload.py --quick --json

An OPT-1.3b-shaped float32 checkpoint (5.3 GB; quick: 0.7 GB) is run with two threads under a memory limit of 1 GiB (quick: half
of that), page cache included. Rates are decoded tokens per second, each system at the largest block that it affords.

`ratio_accelerate`: ours over Accelerate's disk offload (`device_map` with everything on disk).
`ratio_overlap`: overlap on over off, at the block where a step's arithmetic and reading take about the same time.
`ratio_bound`: a step's time there over max(arithmetic, reading), the disk's rate measured in between.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from flags import existing_folder
from random_model import Shape, make_large_model
from report import median_ratio, print_result
from tqdm import tqdm

from asyncpipe.testing.memory_limit import join, memory_limit

THREADS = 2
READ_THREADS = 4
CHUNK_BYTES = 4 << 20


class Scale(NamedTuple):
    shape: Shape
    prompt_len: int
    new_tokens: int  # the first comes with the prompt; the others are timed
    blocks: dict[str, tuple[int, ...]]  # of sequences, that are tried with each system, the largest first
    probe: int  # a block of which the arithmetic is timed
    batch: int  # sequences that are computed at once
    repeats: int
    limit_bytes: int  # of memory
    timeout_s: float  # of a run: one that takes longer reads its own code again and again, for want of memory


SCALES = {
    "full": Scale(
        Shape(hidden=2048, layers=24, vocab=50_272),
        prompt_len=32,
        new_tokens=7,
        blocks={"ours": (128, 96, 64, 32), "accelerate": (24, 16, 12, 8, 4)},
        probe=48,
        batch=64,
        repeats=2,
        limit_bytes=1 << 30,
        timeout_s=180,
    ),
    "quick": Scale(
        Shape(hidden=1024, layers=12, vocab=16_384),
        prompt_len=8,
        new_tokens=5,
        blocks={"ours": (192, 96), "accelerate": (32, 16, 8)},
        probe=64,
        batch=64,
        repeats=1,
        limit_bytes=1 << 29,
        timeout_s=30,
    ),
}


class Run(NamedTuple):
    """What a child measured: seconds of each decode step, and of these the seconds of waiting for weights."""

    block: int
    steps_s: list[float]
    wait_s: float

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s)

    @property
    def tokens_per_s(self) -> float:
        return self.block / self.step_s


# --- the children -----------------------------------------------------------------------------------------------------


async def run_ours(case: dict[str, Any]) -> dict[str, Any]:
    import asyncpipe

    block, new_tokens = case["block"], case["new_tokens"]
    arrivals: list[list[float]] = [[] for _ in range(new_tokens)]
    prompts = make_prompts(block, case["prompt_len"], case["vocab"])
    async with asyncpipe.local(
        case["model"],
        policy=asyncpipe.Policy(**case["policy"]),
        micro_batches=1,
        max_step_tokens=block * case["prompt_len"],
        kv_memory=case["kv_bytes"],
        offload_dir=case["offload_dir"],
        threads_per_stage=THREADS,
    ) as client:
        waits: list[float] = []

        async def one(prompt: list[int]) -> None:
            async for piece in client.stream(prompt, max_new_tokens=new_tokens, ignore_eos=True, timeout_s=900):
                arrivals[piece.index].append(time.perf_counter())
                if len(arrivals[piece.index]) == block and piece.index in (0, new_tokens - 1):
                    waits.append((await client.status()).stages[0].transfers.weights.wait_s)

        await asyncio.gather(*(one(prompt) for prompt in prompts))
    ends = [max(times) for times in arrivals]
    return {"steps_s": [after - before for before, after in itertools.pairwise(ends)], "wait_s": waits[-1] - waits[0]}


def run_accelerate(case: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import OPTForCausalLM

    torch.set_num_threads(THREADS)
    layers = {f"model.decoder.layers.{layer}": "disk" for layer in range(case["layers"])}
    outer = ("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.final_layer_norm", "lm_head")
    model = OPTForCausalLM.from_pretrained(
        case["model"],
        dtype=torch.float32,
        device_map=layers | dict.fromkeys(outer, "disk"),
        offload_folder=case["offload_dir"],
    ).eval()
    tokens = torch.tensor(make_prompts(case["block"], case["prompt_len"], case["vocab"]))
    ends, past = [], None
    with torch.inference_mode():
        for _ in range(case["new_tokens"]):
            output = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
            ends.append(time.perf_counter())
    return {"steps_s": [after - before for before, after in itertools.pairwise(ends)], "wait_s": 0.0}


def make_prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Distinct ones."""
    import random

    rng = random.Random(0)
    return [[rng.randrange(4, vocab) for _ in range(length)] for _ in range(count)]


def child(case: dict[str, Any]) -> None:
    if case["group"]:
        join(Path(case["group"]))
    result = asyncio.run(run_ours(case)) if case["system"] == "ours" else run_accelerate(case)
    print(json.dumps(result))


# --- the parent -------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, folder: Path, scale: Scale, bar: Any) -> None:
        self.scale = scale
        self.model = folder / "model"
        self.offload_dir = folder / "offload"
        self.bar = bar
        bar.set_postfix_str("making the model")
        self.weight_bytes = make_large_model(self.model, scale.shape)
        self.limit_bytes = scale.limit_bytes

    def run(self, system: str, block: int, *, overlap: bool = True) -> Run | None:
        """None when it does not fit into the limit: the kernel ends it, or it goes on forever."""
        self.bar.set_postfix_str(f"{system}, block of {block}, overlap {'on' if overlap else 'off'}")
        self.bar.update()
        scale, shape = self.scale, self.scale.shape
        self.evict()
        with memory_limit(self.limit_bytes) as group:
            self.is_limited = group is not None
            case = {
                "system": system,
                "group": str(group or ""),
                "model": str(self.model),
                "offload_dir": str(self.offload_dir),
                "block": block,
                "prompt_len": scale.prompt_len,
                "new_tokens": scale.new_tokens,
                "vocab": shape.vocab,
                "layers": shape.layers,
                "policy": self.policy(block, overlap=overlap),
                "kv_bytes": 2 * self.kv_bytes(block),
            }
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", json.dumps(case)],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=scale.timeout_s,
                )
            except subprocess.TimeoutExpired:
                tqdm.write(f"{system}, block of {block}: not done in {scale.timeout_s:g} s", file=sys.stderr)
                return None
        if done.returncode:
            tqdm.write(
                f"{system}, block of {block}: {done.stderr.strip().splitlines()[-1:] or done.returncode}", file=sys.stderr
            )
            return None
        found = json.loads(done.stdout.splitlines()[-1])
        return Run(block, found["steps_s"], found["wait_s"])

    def evict(self) -> None:
        """Out of the page cache: what is there already would not count against a run's limit."""
        for path in self.model.glob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def policy(self, block: int, *, overlap: bool) -> dict[str, Any]:
        """Weights on disk; of keys and values, what fits beside the program and its buffers stays in memory."""
        room = max(self.limit_bytes - self.working_bytes, 0)
        cache_percent = int(100 * min(room / self.kv_bytes(block), 1.0))
        batch = min(block, self.scale.batch)
        return {
            "gpu_batch_size": batch,
            "num_gpu_batches": -(-block // batch),
            "w_gpu_percent": 0.0,
            "cache_gpu_percent": float(cache_percent),
            "overlap": overlap,
        }

    def kv_bytes(self, block: int) -> int:
        shape = self.scale.shape
        return block * (self.scale.prompt_len + self.scale.new_tokens) * shape.layers * 2 * shape.hidden * 4

    @property
    def working_bytes(self) -> int:
        """Two Python processes with their libraries; three units of weights; what a batch needs."""
        shape = self.scale.shape
        return (370 << 20) + 3 * 8 * shape.hidden**2 * 4 + self.scale.batch * self.scale.prompt_len * 6 * shape.hidden * 4

    def best(self, system: str) -> Run | None:
        """At the largest block that fits."""
        runs = (self.run(system, block) for block in self.scale.blocks[system])
        return next((run for run in runs if run is not None), None)

    def disk_bytes_per_s(self) -> float:
        """Of reading the weights as a stage does, and nothing else."""
        from asyncpipe_workers.memory.disk import DiskFile, new_buffer

        files = [DiskFile(path) for path in sorted(self.model.glob("*.safetensors"))]
        start_s, num_bytes = time.perf_counter(), 0
        with ThreadPoolExecutor(READ_THREADS) as pool:
            buffers = [new_buffer(CHUNK_BYTES).numpy().data for _ in range(4 * READ_THREADS)]
            reads = []
            for file in files:
                size = os.path.getsize(file.name) // 4096 * 4096
                for offset in range(0, size, CHUNK_BYTES):
                    target = buffers[len(reads) % len(buffers)][: min(CHUNK_BYTES, size - offset)]
                    reads.append(pool.submit(file.read, offset, target))
                    num_bytes += len(target)
            for read in reads:
                read.result()
        for file in files:
            file.close()
        return num_bytes / (time.perf_counter() - start_s)


def measure(bench: Bench) -> dict[str, Any]:
    ours, accelerate = bench.best("ours"), bench.best("accelerate")
    ratios = [ours.tokens_per_s / accelerate.tokens_per_s] if ours and accelerate else []
    probe = require(bench.run("ours", bench.scale.probe, overlap=False))
    block = balanced_block(probe)
    rates, on, off = [], [], []
    for later in range(bench.scale.repeats):
        rates.append(bench.disk_bytes_per_s())
        on.append(require(bench.run("ours", block)))
        off.append(require(bench.run("ours", block, overlap=False)))
        if later and ours and accelerate:
            pair = require(bench.run("ours", ours.block)), require(bench.run("accelerate", accelerate.block))
            ratios.append(pair[0].tokens_per_s / pair[1].tokens_per_s)
    read_s = bench.weight_bytes / statistics.median(rates)
    compute_s = statistics.median(compute_seconds(run) for run in off)
    step_s = statistics.median(run.step_s for run in on)
    return {
        "ratio_accelerate": round(statistics.median(ratios), 2) if ratios else None,
        "ratio_overlap": median_ratio([run.step_s for run in off], [run.step_s for run in on]),
        "ratio_bound": round(step_s / max(read_s, compute_s), 3),
        "ours": describe(ours),
        "accelerate": describe(accelerate),
        "balanced_block": block,
        "step_s": round(step_s, 3),
        "step_without_overlap_s": round(statistics.median(run.step_s for run in off), 3),
        "read_s": round(read_s, 3),
        "compute_s": round(compute_s, 3),
        "disk_GB_per_s": round(statistics.median(rates) / 1e9, 2),
        "weights_GB": round(bench.weight_bytes / 1e9, 2),
        "limit_GB": round(bench.limit_bytes / 1e9, 2),
        "limit_enforced": bench.is_limited,
        "threads": THREADS,
    }


def balanced_block(probe: Run) -> int:
    """Where arithmetic takes as long as reading: it grows with the block, reading does not."""
    read_s = probe.step_s - compute_seconds(probe)
    return min(max(round(probe.block * read_s / compute_seconds(probe) / 8), 1) * 8, 256)


def compute_seconds(run: Run) -> float:
    """Of a step without overlap: what is not waiting for weights."""
    return run.step_s - run.wait_s / len(run.steps_s)


def require(run: Run | None) -> Run:
    if run is None:
        raise SystemExit("a run that worked before did not fit into the memory limit")
    return run


def describe(run: Run | None) -> dict[str, Any] | None:
    if run is None:
        return None
    return {"block": run.block, "step_s": round(run.step_s, 3), "tokens_per_s": round(run.tokens_per_s, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model: under 90 s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--repeats", type=int, help="rounds of overlap on and off (default: 2, quick: 1)")
    parser.add_argument(
        "--folder", type=existing_folder, help="where the model is made, on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    scale = SCALES["quick" if arguments.quick else "full"]
    scale = scale._replace(repeats=arguments.repeats or scale.repeats)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, tqdm(unit="run", disable=None) as bar:
        result = measure(Bench(Path(folder), scale, bar))
    print_result(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
