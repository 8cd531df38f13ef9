"""The second start of a quantized model: loading a stage beside reading the same files, each from disk, in turn.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --quick --json

A random OPT (1.3b's shape, quick: 125m's) is converted as a first start converts it. `read` is to read the files and forget
them, `map` to map them and have them brought in. `ratio` is the median time to load over the smaller of these; the page cache
is told to drop the files before each. `ratio_first` is that of quantizing at the start; `load_again` is with the files still in
the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from one_stage import whole_model
from peer_cases import MODELS, THREADS
from report import print_result
from tqdm import tqdm

from asyncpipe_workers.c_runtime import keep_freed_memory, prepare_c_runtime
from asyncpipe_workers.checkpoint import FileRange
from asyncpipe_workers.memory.mapped import MappedRanges
from asyncpipe_workers.stage_model import StageModel

READ_BYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", default="int8", choices=["int8", "int4"], help="default: int8")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7; quick: 3")
    parser.add_argument("--quick", action="store_true", help="a small model, in under a minute")
    parser.add_argument("--json", action="store_true", help="print medians and ratios as JSON")
    arguments = parser.parse_args()
    prepare_c_runtime()
    keep_freed_memory()
    torch.set_num_threads(THREADS)
    name = "opt-125m" if arguments.quick else "opt-1.3b"
    with tempfile.TemporaryDirectory() as folder:
        whole, quantized = Path(folder) / "whole", Path(folder) / "quantized"
        MODELS[name].make(whole)
        argv = [sys.executable, "-m", "asyncpipe_coordinator", "convert", "--quiet", "--quantize", arguments.quantize]
        subprocess.run([*argv, str(whole), str(quantized)], check=True)
        result = measure(whole, quantized, arguments.quantize, rounds=3 if arguments.quick else arguments.rounds)
    print_result(result | {"model": name}, as_json=arguments.json)


def measure(whole: Path, quantized: Path, quantize: str, *, rounds: int) -> dict[str, object]:
    """Medians in seconds, and ratios."""
    times: dict[str, list[float]] = {"read": [], "map": [], "load": [], "load_again": [], "load_first": []}
    num_bytes = sum(path.stat().st_size for path in _files(quantized))
    load(quantized, quantize)  # kernels are chosen, once on this machine
    for _ in tqdm(range(rounds), desc="start-up", disable=None, leave=False):
        actions = (
            ("read", quantized, read),
            ("map", quantized, map_files),
            ("load", quantized, load),
            ("load_first", whole, load),
        )
        for name, directory, action in actions:
            drop(directory)
            times[name].append(action(directory, quantize))
            if name == "load":
                times["load_again"].append(load(directory, quantize))
    medians = {name: statistics.median(each) for name, each in times.items()}
    reading_s = min(medians["read"], medians["map"])
    return {
        "bytes": num_bytes,
        **{f"{name}_s": round(seconds, 3) for name, seconds in medians.items()},
        "ratio": round(medians["load"] / reading_s, 2),
        "ratio_first": round(medians["load_first"] / reading_s, 2),
    }


def read(directory: Path, _quantize: str) -> float:
    start_s, buffer = time.perf_counter(), bytearray(READ_BYTES)
    for path in _files(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start_s


def map_files(directory: Path, _quantize: str) -> float:
    start_s, ranges = time.perf_counter(), MappedRanges()
    for path in _files(directory):
        size = path.stat().st_size
        ranges.read(FileRange(path, 0, size, torch.uint8, (size,)))
    return time.perf_counter() - start_s


def load(directory: Path, quantize: str) -> float:
    """Until the stage can compute."""
    plan = whole_model(directory, quantize, max_context_len=2048, max_sequences=8, kv_bytes=1 << 28)
    start_s = time.perf_counter()
    stage = StageModel.load(plan)
    seconds = time.perf_counter() - start_s
    stage.close()
    return seconds


def drop(directory: Path) -> None:
    """From the page cache."""
    os.sync()
    for path in _files(directory):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


if __name__ == "__main__":
    main()
