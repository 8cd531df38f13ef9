"""Command line flags, each with an environment variable: `--max-new-tokens` is also ASYNCPIPE_MAX_NEW_TOKENS."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from typing import Any

from asyncpipe.client.sampling import SamplingOptions
from asyncpipe.errors import Invalid
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.model_files import resolve_model

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
    parser.option(
        "--max-step-tokens", type=int, default=512, metavar="T", help="tokens of one step; prompts are cut up (default: 512)"
    )
    parser.option(
        "--kv-memory", type=size_bytes, metavar="SIZE", help="of each stage for keys and values, like 2GiB (default: a share)"
    )
    parser.option(
        "--schedule", default="continuous", help="continuous; barrier or static, to compare with (default: continuous)"
    )
    parser.option("--static", action="store_true", help="the same as --schedule static: padded batches run to their ends")
    parser.option(
        "--device", default="cpu", help="cpu; cuda: stage k on card k; sim:layer_ms=10,…: only takes time (default: cpu)"
    )
    parser.option("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto, float32 on CPUs)")
    parser.option("--threads-per-stage", type=int, metavar="T", help="compute threads (default: the cores, shared out)")
    parser.option("--log-level", default="warning", metavar="LEVEL", help="debug, info, warning or error")


def add_sampling_options(parser: Parser) -> None:
    """How tokens are chosen."""
    parser.option("--max-new-tokens", type=int, default=64, metavar="K", help="at most so many tokens (default: 64)")
    parser.option("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.option("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest tokens (0: all)")
    parser.option("--top-p", type=float, default=1.0, metavar="P", help="... that together reach this probability")
    parser.option("--min-p", type=float, default=0.0, metavar="P", help="... at least so likely, relative to the likeliest")
    parser.option("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (default: 1)")
    parser.option("--presence-penalty", type=float, default=0.0, metavar="X", help="subtracted for generated tokens")
    parser.option("--frequency-penalty", type=float, default=0.0, metavar="X", help="... for each time they were generated")
    parser.option("--logit-bias", type=token_biases, metavar="ID:X,…", help="added to the logits of tokens, like 50256:-100")
    parser.option("--seed", type=int, metavar="S", help="the same seed gives the same text (default: a fresh one)")
    parser.option("--n", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    parser.option("--stop", action="append", metavar="TEXT", help="end before this text appears; may be repeated")
    parser.option("--stop-token-ids", type=token_ids, metavar="ID,…", help="end with any of these tokens")
    parser.option("--min-tokens", type=int, default=0, metavar="K", help="do not end before so many tokens (default: 0)")
    parser.option("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    parser.option("--logprobs", type=int, metavar="K", help="log-probabilities, and K alternatives each (with --json)")
    parser.option("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens (with --json)")


def sampling_options(arguments: argparse.Namespace) -> SamplingOptions:
    """What `add_sampling_options` has read, as the client library takes it."""
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "presence_penalty": arguments.presence_penalty,
        "frequency_penalty": arguments.frequency_penalty,
        "logit_bias": arguments.logit_bias or {},
        "seed": arguments.seed,
        "n": arguments.n,
        "stop": tuple(arguments.stop or ()),
        "stop_token_ids": arguments.stop_token_ids or (),
        "min_tokens": arguments.min_tokens,
        "ignore_eos": arguments.ignore_eos,
        "logprobs": arguments.logprobs,
        "prompt_logprobs": arguments.prompt_logprobs,
    }


def config_of(arguments: argparse.Namespace) -> ServiceConfig:
    """What `add_model_options` has read. Raises Invalid."""
    try:
        schedule = Schedule.STATIC if arguments.static else Schedule(arguments.schedule)
    except ValueError:
        raise Invalid(f"--schedule {arguments.schedule}: use one of {', '.join(Schedule)}") from None
    return ServiceConfig(
        checkpoint=resolve_model(arguments.model),
        num_stages=arguments.stages,
        split=arguments.split,
        num_micro_batches=arguments.micro_batches,
        max_sequences=arguments.max_sequences,
        max_step_tokens=arguments.max_step_tokens,
        kv_bytes=arguments.kv_memory,
        schedule=schedule,
        device=arguments.device,
        dtype=arguments.dtype,
        threads_per_stage=arguments.threads_per_stage,
    )


def size_bytes(text: str) -> int:
    """The value of a size: "512MiB", "2GB", "1.5GiB", or plain bytes."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)(i?)b?", text.strip().lower())
    try:
        number = float(found[1]) if found else -1.0
    except ValueError:
        number = -1.0
    if found is None or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: write a size like 512MiB or 2GiB")
    return int(number * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def token_ids(text: str) -> tuple[int, ...]:
    """The value of --stop-token-ids."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write token ids like 2,50256") from None


def token_biases(text: str) -> dict[int, float]:
    """The value of --logit-bias."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write token ids and biases like 5:-100,7:2.5") from None


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
