"""How certain the choice of each weight's form is, and how long it takes: a first start, again and again.

    python benchmarks/choices.py
    python benchmarks/choices.py --model opt-1.3b --forms fp32 --json

Each time a new process that remembers nothing makes a linear of every shape of a layer, and the head's. `share` is that of
the form that is chosen most often: what is chosen once in a noisy moment stays for good.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peer_cases import MODELS, THREADS
from random_model import Shape
from report import print_result
from tqdm import tqdm

from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec
from asyncpipe_workers.models.kernels import FloatLinears
from asyncpipe_workers.models.quantized import QuantizedLinears
from asyncpipe_workers.quickest import CACHE_FILE

FORMS = {"fp32": torch.float32, "fp16": torch.float16, "int8": RowCodec(), "int4": GroupCodec()}
TIMES = 10
QUICK_TIMES = 3
TIMEOUT_S = 300.0

OPT_MODELS = {name: model for name, model in MODELS.items() if isinstance(model.shape, Shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m", choices=OPT_MODELS, help="whose shapes (default: opt-125m)")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"what weights are stored in (default: {','.join(FORMS)})")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"default: {THREADS}")
    parser.add_argument("--times", type=int, help=f"default: {TIMES}; quick: {QUICK_TIMES}")
    parser.add_argument("--quick", action="store_true", help="fewer times: under 60 s")
    parser.add_argument("--json", action="store_true", help="print choices, shares and seconds as JSON")
    arguments = parser.parse_args()
    forms = arguments.forms.split(",")
    if unknown := [form for form in forms if form not in FORMS]:
        parser.error(f"--forms {','.join(unknown)}: use some of {', '.join(FORMS)}")
    times = arguments.times or (QUICK_TIMES if arguments.quick else TIMES)
    once = functools.partial(choose, arguments.model, forms=forms, threads=arguments.threads)
    print_result(results([apart(once) for _ in tqdm(range(times), unit="start", disable=None)]), as_json=arguments.json)


def apart(work: functools.partial[Mapping[str, Any]]) -> Mapping[str, Any]:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(work).result(timeout=TIMEOUT_S)


def choose(model: str, *, forms: list[str], threads: int) -> Mapping[str, Any]:
    """For each form of each shape, what was chosen and the seconds that took."""
    torch.set_num_threads(threads)
    shape = OPT_MODELS[model].shape
    assert isinstance(shape, Shape)
    hidden = shape.hidden
    shapes = [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden), (shape.vocab, hidden)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        known: set[str] = set()
        for form in forms:
            for out_size, in_size in shapes:
                linears, weight = _linears(form), torch.zeros(out_size, in_size, dtype=_stored(form))
                start_s = time.perf_counter()
                linears(weight, None)
                seconds = time.perf_counter() - start_s
                choices = _choices(Path(folder))
                (new,) = [key for key in choices.keys() - known if f"{out_size}x{in_size}" in key]
                known |= choices.keys()
                found[f"{form}_{out_size}x{in_size}"] = (choices[new], seconds)
    return found


def _linears(form: str) -> FloatLinears | QuantizedLinears:
    what = FORMS[form]
    if isinstance(what, torch.dtype):
        return FloatLinears(torch.float32)
    return QuantizedLinears(what, torch.device("cpu"), torch.float32)


def _stored(form: str) -> torch.dtype:
    what = FORMS[form]
    return what if isinstance(what, torch.dtype) else torch.float32


def _choices(folder: Path) -> Mapping[str, str]:
    (choices,) = json.loads((folder / "asyncpipe" / CACHE_FILE).read_text(encoding="utf-8")).values()
    return choices


def results(starts: list[Mapping[str, Any]]) -> dict[str, Any]:
    chosen: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, list[float]] = defaultdict(list)
    for start in starts:
        for name, (choice, took_s) in start.items():
            chosen[name][choice] += 1
            seconds[name].append(took_s)
    return {
        name: {
            "chosen": (most := counts.most_common(1)[0])[0],
            "share": round(most[1] / counts.total(), 2),
            "seconds": round(statistics.median(seconds[name]), 2),
        }
        for name, counts in chosen.items()
    }


if __name__ == "__main__":
    main()
