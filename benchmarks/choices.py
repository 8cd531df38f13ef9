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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from flags import some_of
from peer_cases import MODELS, THREADS
from random_model import Shape
from report import print_result
from tqdm import tqdm

from asyncpipe_workers.c_runtime import prepare_c_runtime
from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec
from asyncpipe_workers.models.kernels import FloatLinears, LinearMaker
from asyncpipe_workers.models.quantized import QuantizedLinears
from asyncpipe_workers.quickest import CACHE_FILE

CPU = torch.device("cpu")
FORMS: Mapping[str, tuple[torch.dtype, LinearMaker]] = {
    "fp32": (torch.float32, FloatLinears(torch.float32)),
    "fp16": (torch.float16, FloatLinears(torch.float32)),
    "int8": (torch.float32, QuantizedLinears(RowCodec(), CPU, torch.float32)),
    "int4": (torch.float32, QuantizedLinears(GroupCodec(), CPU, torch.float32)),
}
"""What a weight is made of, and what makes its linear."""
TIMES = 10
QUICK_TIMES = 3
TIMEOUT_S = 300.0

SHAPES = {name: model.shape for name, model in MODELS.items() if isinstance(model.shape, Shape)}


class Choice(NamedTuple):
    """Of one weight at one start."""

    form: str
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m", choices=SHAPES, help="whose shapes (default: opt-125m)")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"what weights are stored in (default: {','.join(FORMS)})")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"default: {THREADS}")
    parser.add_argument("--times", type=int, help=f"default: {TIMES}; quick: {QUICK_TIMES}")
    parser.add_argument("--quick", action="store_true", help="fewer times: under 60 s")
    parser.add_argument("--json", action="store_true", help="print choices, shares and seconds as JSON")
    arguments = parser.parse_args()
    forms = some_of(parser, "--forms", arguments.forms, FORMS)
    times = (QUICK_TIMES if arguments.quick else TIMES) if arguments.times is None else arguments.times
    if times < 1:
        parser.error(f"--times {times}: use 1 or more")
    prepare_c_runtime()  # of the processes that are started
    once = functools.partial(choose, arguments.model, forms=forms, threads=arguments.threads)
    starts = [apart(once) for _ in tqdm(range(times), unit="start", disable=None)]
    print_result({name: result([start[name] for start in starts]) for name in starts[0]}, as_json=arguments.json)


def apart(work: Callable[[], Mapping[str, Choice]]) -> Mapping[str, Choice]:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(work).result(timeout=TIMEOUT_S)


def choose(model: str, *, forms: list[str], threads: int) -> Mapping[str, Choice]:
    torch.set_num_threads(threads)
    hidden, vocab = SHAPES[model].hidden, SHAPES[model].vocab
    shapes = [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden), (vocab, hidden)]
    found: dict[str, Choice] = {}
    known: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for form in forms:
            dtype, make = FORMS[form]
            for out_size, in_size in shapes:
                weight, shape = torch.zeros(out_size, in_size, dtype=dtype), f"{out_size}x{in_size}"
                start_s = time.perf_counter()
                make(weight, None)
                seconds = time.perf_counter() - start_s
                choices = _choices(Path(folder))
                (new,) = [key for key in choices.keys() - known if shape in key]
                known |= choices.keys()
                found[f"{form}_{shape}"] = Choice(choices[new], seconds)
    return found


def _choices(folder: Path) -> dict[str, str]:
    """All that this machine remembers."""
    (choices,) = json.loads((folder / "asyncpipe" / CACHE_FILE).read_text(encoding="utf-8")).values()
    return dict(choices)


def result(choices: Sequence[Choice]) -> Mapping[str, str | float]:
    ((chosen, count),) = Counter(choice.form for choice in choices).most_common(1)
    seconds = statistics.median(choice.seconds for choice in choices)
    return {"chosen": chosen, "share": round(count / len(choices), 2), "seconds": round(seconds, 2)}


if __name__ == "__main__":
    main()
