"""The flags of `bench` beyond those of every model command, and how presets fill in those that were not given."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from asyncpipe.errors import Invalid
from asyncpipe.policy import PERCENT_FIELDS
from asyncpipe_coordinator.bench_presets import Preset
from asyncpipe_coordinator.flags import ENV_PREFIX, Parser
from asyncpipe_coordinator.model_files import has_dummy_path
from asyncpipe_coordinator.policy_files import read_settings

DEFAULT_PROMPT_LEN = 512
DEFAULT_GEN_LEN = 32
FEWER_BATCH_GEN_LEN = 5  # what FlexLLMGen's own scripts cut at
DEBUG_MODES = ("breakdown", "fewer_batch")
COMM_DEVICES = ("cpu", "gpu")
FILLED_IN = {"stages": 1, "load_format": "auto", "prompt_len": None, "gen_len": DEFAULT_GEN_LEN, "schedule": None}
"""Defaults that come after a preset's; until then the arguments are None."""

BENCH_EPILOG = """examples:
  asyncpipe-coordinator bench --stages 2 --gpu-batch-size 8 --prompt-len 128 --gen-len 32     the bundled model
  asyncpipe-coordinator bench ./opt-1.3b --stages 2 --num-inner-iterations 4 --plot run.png --json
  asyncpipe-coordinator bench facebook/opt-125m --load-format dummy --percent 0 50 0 100 100 0 --debug-mode breakdown
  asyncpipe-coordinator bench --preset opt-30b --device cuda --cut-gen-len 5                  FlexLLMGen's policy for it
  asyncpipe-coordinator bench --list-presets

Prompts are random token ids, all different, and every one gets exactly --gen-len tokens. There are gpu_batch_size x
num_gpu_batches x num_inner_iterations of them; all wait before the first step, then each micro-batch takes a whole block
(--schedule static; continuous and barrier to compare with). Times are measured at the client. With --cut-gen-len, decode and
total figures are projected, and say so; the measured ones stand beside them.
"""


def add_bench_options(parser: Parser) -> None:
    """After `add_model_options`."""
    parser.add_argument("--model", dest="model_name", metavar="NAME", help="the same as MODEL")
    _add_workload(parser)
    _add_flexllmgen(parser)
    parser.option("--preset", metavar="NAME", help="a published run of FlexLLMGen; flags given beside it win")
    parser.option("--list-presets", action="store_true", help="print a table of them and exit")
    parser.option("--seed", type=int, default=0, metavar="S", help="of the prompts (default: 0)")
    parser.option("--timeout", type=float, default=86400.0, metavar="S", help="seconds for the whole run (default: 86400)")
    parser.option("--log-file", metavar="FILE", help="to append the report to (default: named by the policy, like FlexLLMGen)")
    parser.option("--no-log", action="store_true", help="write no log file")
    parser.option("--plot", metavar="FILE", help="a picture of the steps and stages, .png (needs matplotlib)")
    parser.option("--json", action="store_true", help="the report as one JSON object on stdout")
    parser.option("--trace", metavar="FILE", help="what the stages did, without the warm-up, for ui.perfetto.dev")
    parser.option("--quiet", action="store_true", help="no progress")
    for name in FILLED_IN:
        if ENV_PREFIX + name.upper() not in os.environ:
            parser.set_defaults(**{name: None})


def _add_workload(parser: Parser) -> None:
    parser.option("--prompt-len", type=int, metavar="T", help=f"tokens of each prompt (default: {DEFAULT_PROMPT_LEN})")
    parser.option("--gen-len", type=int, metavar="T", help=f"tokens generated for each (default: {DEFAULT_GEN_LEN})")
    parser.option(
        "--cut-gen-len",
        type=int,
        metavar="T",
        help="generate only so many, and project decode's time from the mean of its steps; the report says so",
    )
    parser.option(
        "--num-inner-iterations", type=int, metavar="M", help="the same as --micro-batches (default: one for each stage)"
    )
    parser.switch("--warm-up", help="a short run before the measured one (default: true)")
    parser.option("--no-warm-up", action="store_true", help="the same as --warm-up false")


def _add_flexllmgen(parser: Parser) -> None:
    parser.option(
        "--comm-device", default="cpu", metavar="cpu|gpu", help="cpu: hidden states travel in messages (default: cpu)"
    )
    parser.option("--async-comm", action="store_true", help="accepted: hidden states always travel while others are computed")
    parser.option(
        "--debug-mode",
        metavar="MODE",
        help="breakdown: no overlap, and the seconds of each part of prefill and decode;"
        f" fewer_batch: --cut-gen-len {FEWER_BATCH_GEN_LEN}",
    )


def apply_preset(arguments: argparse.Namespace, preset: Preset) -> None:
    """Fill in what was not given. Raises Invalid for a bad --policy."""
    _fill(arguments, "model", preset.model)
    if not _has_weights(arguments):
        _fill(arguments, "load_format", "dummy")
    taken = _settled(arguments)
    for name, value in preset.settings().items():
        if name not in taken:
            _fill(arguments, name, value)


def _has_weights(arguments: argparse.Namespace) -> bool:
    """A directory was given; a name alone would mean a download."""
    if arguments.path is not None:
        return not has_dummy_path(arguments.path)
    return Path(arguments.model).expanduser().is_dir()


def _settled(arguments: argparse.Namespace) -> frozenset[str]:
    """What the preset may not say, for other flags do."""
    settled: set[str] = set()
    if arguments.policy:
        found = read_settings(arguments.policy)
        settled.update(*([found] if isinstance(found, dict) else found))
    if arguments.device_memory is not None or settled & set(PERCENT_FIELDS):
        settled.add("percent")
    if arguments.micro_batches is not None:
        settled.add("num_inner_iterations")
    return frozenset(settled)


def _fill(arguments: argparse.Namespace, name: str, value: Any) -> None:
    if getattr(arguments, name) is None:
        setattr(arguments, name, value)


def settle(arguments: argparse.Namespace) -> None:
    """What is left gets its default; FlexLLMGen's spellings become ours. Raises Invalid for flags that do not go together."""
    for name, value in FILLED_IN.items():
        _fill(arguments, name, value)
    if arguments.comm_device not in COMM_DEVICES:
        raise Invalid(f"--comm-device {arguments.comm_device}: use one of {', '.join(COMM_DEVICES)}")
    if arguments.comm_device == "gpu":
        raise Invalid("--comm-device gpu: NCCL links are not there yet; use --comm-device cpu")
    _settle_inner_iterations(arguments)
    _settle_debug_mode(arguments)


def settle_model(arguments: argparse.Namespace) -> None:
    """`--model NAME` is MODEL. Raises Invalid."""
    given, name = arguments.model, arguments.model_name
    if name is not None and given not in (None, name, os.environ.get(ENV_PREFIX + "MODEL")):
        raise Invalid(f"--model {name} and MODEL {given}: give one of them")
    arguments.model = given if name is None else name


def _settle_inner_iterations(arguments: argparse.Namespace) -> None:
    inner, micro_batches = arguments.num_inner_iterations, arguments.micro_batches
    if None not in (inner, micro_batches) and inner != micro_batches:
        raise Invalid(f"--num-inner-iterations {inner} and --micro-batches {micro_batches}: give one of them")
    if micro_batches is None:
        arguments.micro_batches = arguments.stages if inner is None else inner


def _settle_debug_mode(arguments: argparse.Namespace) -> None:
    mode = arguments.debug_mode
    if mode is not None and mode not in DEBUG_MODES:
        raise Invalid(f"--debug-mode {mode}: use one of {', '.join(DEBUG_MODES)}")
    if mode == "fewer_batch":
        _fill(arguments, "cut_gen_len", FEWER_BATCH_GEN_LEN)
    if mode == "breakdown":
        if arguments.overlap:
            raise Invalid("--debug-mode breakdown with --overlap: the parts of overlapping work cannot be told apart")
        arguments.overlap = False
