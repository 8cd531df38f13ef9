"""The flags that say where weights, keys and values, and activations live: FlexLLMGen's, and ours."""

from __future__ import annotations

import argparse
from typing import Any

from asyncpipe.errors import Invalid
from asyncpipe.policy import PERCENT_FIELDS, POLICY_FIELDS, Placement, Policy
from asyncpipe_coordinator.flags import Parser, size_bytes
from asyncpipe_coordinator.policy_files import Settings, read_settings

BATCH_FIELDS = ("gpu_batch_size", "num_gpu_batches")


def add_policy_options(parser: Parser) -> None:
    """A flag of the command line wins over its environment variable, and that over `--policy`."""
    parser.option(
        "--percent",
        nargs=6,
        metavar=("W_GPU", "W_CPU", "C_GPU", "C_CPU", "A_GPU", "A_CPU"),
        help="percent of weights, of keys and values, and of activations on the device and on the host; the rest is on disk"
        " (default: 100 0 100 0 100 0)",
    )
    parser.option("--gpu-batch-size", type=int, metavar="B", help="sequences that are computed at once (default: 32)")
    parser.option(
        "--num-gpu-batches", type=int, metavar="K", help="batches for which weights are loaded once; a micro-batch is B x K"
    )
    _add_switches(parser)
    parser.option(
        "--attn-sparsity", type=float, metavar="X", help="share of values that decoding attends to (default: 1, exact)"
    )
    parser.option("--placement", help="exact: tensors are split by rows; flexllmgen: whole, by its rule (default: exact)")
    parser.option(
        "--policy", metavar="FILE", help="JSON or TOML: the policy's fields by name, or a list of them, stages, one a stage"
    )
    parser.option("--offload-dir", metavar="DIR", help="for what is on disk (default: the system's temporary folder)")
    parser.option(
        "--device-memory", type=size_bytes, metavar="SIZE", help="of each stage, like 8GiB: choose percentages that fit into it"
    )
    parser.option(
        "--host-memory", type=size_bytes, metavar="SIZE", help="... and into this much on the host (default: all is room)"
    )


def _add_switches(parser: Parser) -> None:
    parser.switch("--sep-layer", help="load attention and feed-forward one after the other (default: true)")
    parser.switch("--pin-weight", help="page-locked memory for weights on the host (default: true)")
    parser.switch("--overlap", help="move bytes while others are computed (default: true)")
    parser.switch("--cpu-cache-compute", help="attend to keys and values on the host where they are (default: false)")
    parser.switch("--compress-weight", help="weights in 4 bits, by groups (default: false)")
    parser.switch("--compress-cache", help="keys and values in 4 bits, by groups (default: false)")


def chosen_policy(arguments: argparse.Namespace) -> Policy | tuple[Policy, ...]:
    """What `add_policy_options` has read: for all stages, or one for each stage. Raises Invalid."""
    found = read_settings(arguments.policy) if arguments.policy else {}
    flags = _from_flags(arguments)
    if isinstance(found, dict):
        return _policy(found | flags, arguments)
    return tuple(_policy(settings | flags, arguments) for settings in found)


def _policy(settings: Settings, arguments: argparse.Namespace) -> Policy:
    policy = Policy(**settings)
    _check_budgets(settings, arguments)
    if settings.keys() & set(BATCH_FIELDS) and arguments.max_sequences not in (None, policy.block_size):
        raise Invalid(
            f"--max-sequences {arguments.max_sequences}: a micro-batch has gpu_batch_size x num_gpu_batches ="
            f" {policy.gpu_batch_size} x {policy.num_gpu_batches} = {policy.block_size} sequences; leave one of them away"
        )
    return policy


def _check_budgets(settings: Settings, arguments: argparse.Namespace) -> None:
    budgets = [
        flag
        for flag, value in (("--device-memory", arguments.device_memory), ("--host-memory", arguments.host_memory))
        if value is not None
    ]
    given = "--percent" if arguments.percent else ", ".join(name for name in PERCENT_FIELDS if name in settings)
    if budgets and given:
        raise Invalid(f"{' and '.join(budgets)} with {given}: percentages are either derived or given; leave one of them away")


def _from_flags(arguments: argparse.Namespace) -> Settings:
    """Only those that were given."""
    values = {name: getattr(arguments, name, None) for name in POLICY_FIELDS}
    settings: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if arguments.percent is not None:
        settings |= dict(zip(PERCENT_FIELDS, _percents(arguments.percent), strict=True))
    if arguments.placement is not None:
        settings["placement"] = _placement(arguments.placement)
    return settings


def _percents(texts: list[str]) -> list[float]:
    try:
        percents = [float(text) for text in texts]
    except ValueError:
        percents = []
    if len(percents) != len(PERCENT_FIELDS):
        raise Invalid(f"--percent {' '.join(texts)}: write six numbers, like 20 80 0 100 100 0")
    return percents


def _placement(text: str) -> Placement:
    try:
        return Placement(text)
    except ValueError:
        raise Invalid(f"--placement {text}: use one of {', '.join(Placement)}") from None
