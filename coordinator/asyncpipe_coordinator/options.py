"""Command line flags, each with an environment variable: `--max-new-tokens` is also ASYNCPIPE_MAX_NEW_TOKENS."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from asyncpipe.errors import Invalid

ENV_PREFIX = "ASYNCPIPE_"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose every option takes its default from the environment and says so in its help."""

    def option(self, flag: str, *, env: Mapping[str, str] = os.environ, **settings: Any) -> None:
        """`add_argument` for `flag`; the environment's text goes through the flag's own `type`."""
        variable = ENV_PREFIX + flag.lstrip("-").replace("-", "_").upper()
        if settings.get("action") == "store_true":
            settings["default"] = env.get(variable, "").lower() in ("1", "true", "yes")
        elif variable in env:
            value = env[variable]
            settings["default"] = value.split("\n") if settings.get("action") == "append" else value
        settings["help"] = f"{settings['help']} [{variable}]"
        self.add_argument(flag, **settings)


def add_model_options(parser: Parser) -> None:
    """What every command that runs a model takes."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=os.environ.get(ENV_PREFIX + "MODEL"),
        help="a Hugging Face directory or hub name; without it, the small bundled model [ASYNCPIPE_MODEL]",
    )
    parser.option("--stages", type=int, default=1, metavar="N", help="stage worker processes (default: 1)")
    parser.option("--split", type=layer_counts, metavar="5,4,3", help="decoder layers of each stage (default: even)")
    parser.option(
        "--micro-batches", type=int, metavar="M", help="micro-batches in flight (default: chosen from what is measured)"
    )
    parser.option("--max-sequences", type=int, default=32, metavar="B", help="sequences in one micro-batch (default: 32)")
    parser.option("--device", default="cpu", help="cpu, or cuda: stage k on card k (default: cpu)")
    parser.option("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto, float32 on CPUs)")
    parser.option("--threads-per-stage", type=int, metavar="T", help="compute threads (default: the cores, shared out)")
    parser.option("--log-level", default="warning", metavar="LEVEL", help="debug, info, warning or error")


def add_sampling_options(parser: Parser) -> None:
    """How tokens are chosen."""
    parser.option("--max-new-tokens", type=int, default=64, metavar="K", help="at most so many tokens (default: 64)")
    parser.option("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.option("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest tokens (0: all)")
    parser.option("--top-p", type=float, default=1.0, metavar="P", help="... that together reach this probability")
    parser.option("--seed", type=int, metavar="S", help="the same seed gives the same text (default: a fresh one)")
    parser.option("--stop", action="append", metavar="TEXT", help="end before this text appears; may be repeated")
    parser.option("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")


def layer_counts(text: str) -> tuple[int, ...]:
    """The value of --split."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write layer counts like 5,4,3") from None


def check_log_level(level: str) -> str:
    """The level's name for `logging`. Raises Invalid."""
    if level.lower() not in ("debug", "info", "warning", "error"):
        raise Invalid(f"--log-level {level}: use debug, info, warning or error")
    return level.upper()
