"""Command line flags, each with an environment variable: `--max-new-tokens` is also ASYNCPIPE_MAX_NEW_TOKENS."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from asyncpipe.client.sampling import SamplingOptions
from asyncpipe.errors import Invalid
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.flags import ENV_PREFIX, Parser, layer_counts, size_bytes, token_biases, token_ids
from asyncpipe_coordinator.model_files import generation_defaults, has_dummy_path, name_elsewhere, resolve_model
from asyncpipe_coordinator.policy_options import add_policy_options, chosen_policy

LOAD_FORMATS = ("auto", "dummy")


def add_model_options(parser: Parser) -> None:
    """What every command that runs a model takes."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=os.environ.get(ENV_PREFIX + "MODEL"),
        help="a Hugging Face directory or hub name; without it, the small bundled model [ASYNCPIPE_MODEL]",
    )
    parser.option("--path", metavar="DIR", help="where FlexLLMGen's weights are: DIR/<name>-np; _DUMMY_: --load-format dummy")
    parser.option(
        "--load-format",
        default="auto",
        metavar="auto|dummy",
        help="dummy: random weights; MODEL needs no files if its shape is known, like opt-175b (default: auto)",
    )
    parser.option("--stages", type=int, default=1, metavar="N", help="stage worker processes (default: 1)")
    parser.option("--split", type=layer_counts, metavar="5,4,3", help="decoder layers of each stage (default: even)")
    parser.option(
        "--micro-batches", type=int, metavar="M", help="micro-batches in flight (default: chosen from what is measured)"
    )
    parser.option("--max-sequences", type=int, metavar="B", help="sequences in one micro-batch (default: 32)")
    parser.option(
        "--max-step-tokens",
        type=int,
        metavar="T",
        help="tokens of one step; prompts are cut up (default: 512, or 4096 where weights are moved for every step)",
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
    parser.option(
        "--model-impl",
        default="auto",
        metavar="auto|native|transformers",
        help="whose code computes the layers: ours, or transformers' (default: auto, ours where there is any)",
    )
    parser.option(
        "--quantize",
        metavar="int8|int4",
        help="multiply in int8 (faster; CPUs) or with 4-bit weights (smallest); kept for the next start (default: --dtype)",
    )
    parser.option(
        "--kv-dtype",
        default="auto",
        help="of keys and values: float16, or as --dtype (default: auto, float16 on CPUs with --quantize, else as --dtype)",
    )
    parser.option("--threads-per-stage", type=int, metavar="T", help="compute threads (default: the cores, shared out)")
    pin_help = "keep stages to NUMA nodes, or each thread to a core of its own (default: auto: to nodes if there are several)"
    parser.option("--pin", default="auto", metavar="auto|cores|off", help=pin_help)
    add_policy_options(parser)
    link_help = "for hidden states: zmq; gloo (CPUs) or nccl (GPUs) of torch (default: auto, nccl from card to card)"
    parser.option("--link", default="auto", metavar="auto|zmq|gloo|nccl", help=link_help)
    parser.option("--spares", type=int, default=0, metavar="N", help="processes that wait to replace a lost one (default: 0)")
    parser.option(
        "--max-restarts", type=int, default=3, metavar="N", help="lost workers to replace within a minute (default: 3)"
    )
    parser.option("--log-level", default="warning", metavar="LEVEL", help="debug, info, warning or error")


def add_cluster_options(parser: Parser) -> None:
    """Where workers come from, and who may come."""
    parser.option(
        "--workers",
        default="local",
        metavar="local|external",
        help="local: started here; external: those that join from anywhere, see asyncpipe-worker --help (default: local)",
    )
    parser.option(
        "--join-timeout", type=float, metavar="S", help="seconds to wait for missing workers (default: 60; external: 3600)"
    )
    parser.option("--keys", metavar="DIR", help="the coordinator's key and those it lets in, of keygen (default: no keys)")
    parser.option("--insecure", action="store_true", help="without keys, let other machines reach --bind all the same")


def add_sampling_options(parser: Parser) -> None:
    """How tokens are chosen."""
    parser.option("--max-new-tokens", type=int, default=64, metavar="K", help="at most so many tokens (default: 64)")
    own = "MODEL's generation_config.json, else"
    parser.option("--temperature", type=float, metavar="T", help=f"0 is greedy (default: {own} 0)")
    parser.option("--top-k", type=int, metavar="K", help=f"sample among the K likeliest tokens (0: all; default: {own} 0)")
    parser.option("--top-p", type=float, metavar="P", help=f"... that together reach this probability (default: {own} 1)")
    parser.option("--min-p", type=float, default=0.0, metavar="P", help="... at least so likely, relative to the likeliest")
    parser.option("--repetition-penalty", type=float, metavar="X", help=f"above 1: repeat less (default: {own} 1)")
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


def sampling_options(arguments: argparse.Namespace, checkpoint: Path) -> SamplingOptions:
    """What `add_sampling_options` has read, as the client library takes it. What is not given is as `checkpoint` says."""
    own = generation_defaults(checkpoint)
    given = {name: getattr(arguments, name) for name in own}
    chosen = {name: own[name] if value is None else value for name, value in given.items()}
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": chosen["temperature"],
        "top_k": int(chosen["top_k"]),
        "top_p": chosen["top_p"],
        "min_p": arguments.min_p,
        "repetition_penalty": chosen["repetition_penalty"],
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
    policy, dummy = chosen_policy(arguments), _wants_dummy_weights(arguments)  # mistakes in these come before a download
    workers = getattr(arguments, "workers", "local")
    return ServiceConfig(
        checkpoint=resolve_model(
            arguments.model, dummy=dummy, weights=None if dummy else arguments.path, with_weights=workers == "local"
        ),
        model_name=name_elsewhere(arguments.model),
        workers=workers,
        link=arguments.link,
        spares=arguments.spares,
        max_restarts=arguments.max_restarts,
        join_timeout_s=getattr(arguments, "join_timeout", None),
        dummy_weights=dummy,
        num_stages=arguments.stages,
        split=arguments.split,
        num_micro_batches=arguments.micro_batches,
        max_sequences=arguments.max_sequences,
        max_step_tokens=arguments.max_step_tokens,
        policy=policy,
        device_memory=arguments.device_memory,
        host_memory=arguments.host_memory,
        offload_dir=Path(arguments.offload_dir).expanduser() if arguments.offload_dir else None,
        kv_bytes=arguments.kv_memory,
        schedule=schedule,
        device=arguments.device,
        dtype=arguments.dtype,
        model_impl=arguments.model_impl,
        quantize=arguments.quantize,
        kv_dtype=arguments.kv_dtype,
        threads_per_stage=arguments.threads_per_stage,
        pin=arguments.pin,
    )


def _wants_dummy_weights(arguments: argparse.Namespace) -> bool:
    if arguments.load_format not in LOAD_FORMATS:
        raise Invalid(f"--load-format {arguments.load_format}: use one of {', '.join(LOAD_FORMATS)}")
    return arguments.load_format == "dummy" or has_dummy_path(arguments.path)


def check_log_level(level: str) -> str:
    """The level's name for `logging`. Raises Invalid."""
    if level.lower() not in ("debug", "info", "warning", "error"):
        raise Invalid(f"--log-level {level}: use debug, info, warning or error")
    return level.upper()
