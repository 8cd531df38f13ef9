"""Ours beside Hugging Face, CTranslate2 and llama.cpp: the same random weights, prompts and number of threads, in one run.

    python benchmarks/peers.py --quick --json
    python benchmarks/peers.py --models llama-1.1b --batches 1,32 --plot docs/peers.png
    python benchmarks/peers.py --models opt-125m --prefill --only ours_fp32,hf_fp32

Checkpoints are stored as these models are published, OPT in float16 and Llama in bfloat16, or as --stored says; everybody
computes in what the case is named after. Distinct random prompts of 128 tokens, 32 new tokens each, greedy, end tokens ignored;
two threads for everybody. Every engine is a process of its own and is asked in turn, round by round; figures are medians,
ratios medians of the ratios round by round.

All times are of one run, of when its tokens came: prefill is from the start to the first token of the last sequence; decode is
the mean step in which all sequences take part; end to end is all tokens over all of the time. Ours streams to a client in
another process, and with two stages each has one thread (`2x1`); Hugging Face `generate` tells a streamer, CTranslate2 a
callback, and llama.cpp is asked step by step. `prefill` in the JSON is the time to the first token of one prompt of 2,040
tokens.

Peers that are not installed are left out, with the reason: pip install -e '.[peers]'. llama-cpp-python is compiled by pip.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import peer_report
from flags import batch_sizes, existing_folder
from peer_cases import (
    CASES,
    DEFAULT_BATCHES,
    DTYPE_BYTES,
    MODELS,
    PREFILL,
    PREFILL_CASES,
    QUICK_CASES,
    Case,
    Model,
    Workload,
    batch_workload,
)
from peer_process import EngineError, Fleet, OpenError, available_bytes
from tqdm import tqdm

from asyncpipe.errors import Invalid
from asyncpipe_coordinator.bench_plot import check_plot

QUICK_BATCHES = (1, 32)
SLOW_S = 120.0
QUICK_SLOW_S = 8.0

Item = TypeVar("Item")


class Plan(NamedTuple):
    models: list[Model]
    cases: list[Case]
    batches: list[Workload]  # may be empty
    has_prefill: bool  # the time to the first token of one long prompt too
    rounds: int
    repeat_under_s: float  # what takes longer is run only once

    @property
    def max_batch(self) -> int:
        return max((workload.batch for workload in self.batches), default=PREFILL.batch)

    def turns(self, *, is_one_fleet: bool) -> list[tuple[Case, Workload]]:
        """Of a round. Where all engines fit into memory, those that are compared come right after each other."""
        by_workload = [
            (case, workload)
            for workload in (*self.batches, *([PREFILL] if self.has_prefill else []))
            for case in self.cases
            if workload != PREFILL or case.name in PREFILL_CASES
        ]
        return by_workload if is_one_fleet else sorted(by_workload, key=lambda turn: self.cases.index(turn[0]))


def measure(plan: Plan, model: Model, folder: Path, bar: Any, found: peer_report.Findings) -> None:
    """Adds to `found`."""
    for case in plan.cases:
        if reason := reason_to_skip(case, model):
            found.reasons[case.name] = f"skipped: {reason}"
    bar.set_postfix_str(f"making {model.name}")
    num_weights = model.make(folder / "model") // DTYPE_BYTES[model.dtype]
    is_one_fleet = num_weights * sum(case.bytes_per_weight for case in plan.cases) < available_bytes() / 3
    slow: set[tuple[str, str]] = set()
    with Fleet(model, folder=folder, num_weights=num_weights, max_batch=plan.max_batch) as fleet:
        for number in range(plan.rounds):
            for case, workload in plan.turns(is_one_fleet=is_one_fleet):
                bar.set_postfix_str(f"{model.name}, {case.name}, {workload.name}")
                if not found.is_hopeless(case, workload) and (case.name, workload.name) not in slow:
                    total_s = take_turn(fleet, found, case, workload, number=number)
                    if total_s > plan.repeat_under_s:
                        slow.add((case.name, workload.name))
                bar.update()


def take_turn(fleet: Fleet, found: peer_report.Findings, case: Case, workload: Workload, *, number: int) -> float:
    """Returns the seconds that it took; a failure is written down, and takes none."""
    try:
        timing = fleet.run(case, workload, seed=1 + number)
    except EngineError as error:
        name = case.name if isinstance(error, OpenError) else f"{case.name}_{workload.name}"
        found.reasons[name] = f"failed: {error}"
        tqdm.write(f"{name} {found.reasons[name]}", file=sys.stderr)
        return 0.0
    found.add(case, workload, number=number, timing=timing)
    return timing.total_s


def reason_to_skip(case: Case, model: Model) -> str | None:
    if importlib.util.find_spec(case.package) is None:
        return f"{case.package} is not installed: pip install -e '.[peers]'"
    return case.missing_for(model)


def run(plan: Plan, *, parent: Path | None, found: dict[str, peer_report.Findings]) -> None:
    """Adds to `found`, so that nothing is lost when it is ended."""
    turns = len(plan.turns(is_one_fleet=True))
    with tqdm(total=len(plan.models) * plan.rounds * turns, unit="run", disable=None, file=sys.stderr) as bar:
        for model in plan.models:
            with tempfile.TemporaryDirectory(dir=parent, prefix="asyncpipe-peers-") as folder:
                found[model.name] = peer_report.Findings(model.dtype)
                measure(plan, model, Path(folder), bar, found[model.name])


# --- the command ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help=f"default: {','.join(MODELS)}; quick: opt-125m")
    parser.add_argument("--batches", type=batch_sizes, help="default: 1,8,32; quick: 1,32")
    parser.add_argument("--only", metavar="CASES", help=f"of {','.join(CASES)} (default: all; quick: {','.join(QUICK_CASES)})")
    parser.add_argument("--stored", choices=DTYPE_BYTES, help="what weights are stored in (default: as they are published)")
    parser.add_argument("--rounds", type=int, help="default: 3; quick: 2")
    parser.add_argument("--prefill", action="store_true", help="only the time to the first token of one long prompt")
    parser.add_argument("--quick", action="store_true", help="fewer of everything, and no long prompt: under 3 minutes")
    parser.add_argument(
        "--repeat-under",
        type=float,
        metavar="S",
        help=f"an engine at a batch that takes longer is run once (default: {SLOW_S:g}; quick: {QUICK_SLOW_S:g})",
    )
    parser.add_argument(
        "--folder", type=existing_folder, help="where models are made, up to 13 GB at once (default: a temporary one)"
    )
    parser.add_argument("--json", action="store_true", help="print medians and ratios as JSON")
    parser.add_argument("--plot", metavar="FILE", help="a picture of decoded tokens per second, .png, .svg or .pdf")
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)  # so many only, to try the benchmark out
    return parser


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Raises Invalid."""
    quick = arguments.quick
    models = _chosen("--models", arguments.models, MODELS, default=("opt-125m",) if quick else tuple(MODELS))
    if arguments.layers:
        models = [model._replace(shape=model.shape._replace(layers=arguments.layers)) for model in models]
    if arguments.stored:
        models = [model._replace(dtype=arguments.stored) for model in models]
    batches = arguments.batches or (QUICK_BATCHES if quick else DEFAULT_BATCHES)
    rounds = (2 if quick else 3) if arguments.rounds is None else arguments.rounds
    if rounds < 1:
        raise Invalid(f"--rounds {rounds}: use at least 1")
    default = PREFILL_CASES if arguments.prefill else QUICK_CASES if quick else tuple(CASES)
    return Plan(
        models=models,
        cases=_chosen("--only", arguments.only, CASES, default=default),
        batches=[] if arguments.prefill else [batch_workload(batch) for batch in batches],
        has_prefill=arguments.prefill or not quick,
        rounds=rounds,
        repeat_under_s=(QUICK_SLOW_S if quick else SLOW_S) if arguments.repeat_under is None else arguments.repeat_under,
    )


def _chosen(flag: str, text: str | None, known: dict[str, Item], *, default: Sequence[str]) -> list[Item]:
    names = list(dict.fromkeys(text.split(","))) if text else default
    if unknown := [name for name in names if name not in known]:
        raise Invalid(f"{flag} {','.join(unknown)}: use some of {', '.join(known)}")
    return [known[name] for name in names]


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    try:
        plan = make_plan(arguments)
        plot = check_plot(arguments.plot) if arguments.plot else None
    except Invalid as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, _end)
    found: dict[str, peer_report.Findings] = {}
    status: int | str | None = 0
    try:
        run(plan, parent=arguments.folder, found=found)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as end:
        status = end.code
    if status:
        print("ended early; what follows is what was measured until then", file=sys.stderr)
    if arguments.json:
        print(json.dumps(peer_report.as_json(found, rounds=plan.rounds), indent=2))
    else:
        print(peer_report.as_text(found, rounds=plan.rounds))
    if plot and not status:
        peer_report.draw(found, plot)
    sys.exit(status)


if __name__ == "__main__":
    main()
