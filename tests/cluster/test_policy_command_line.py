"""Policies and budgets as a user gives them on the command line, and sees them again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import asyncpipe
from tests.cluster.test_command_line import assert_one_clear_line, coordinator


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--percent 20 80 0", ["--percent", "6 arguments"]),
        ("--percent 20 90 0 100 0 100", ["w_gpu_percent 20", "w_cpu_percent 90", "more than 100"]),
        ("--percent a b c d e f", ["--percent a b c d e f", "six numbers"]),
        ("--compress-weight=maybe", ["--compress-weight", "'maybe'", "true or false"]),
        ("--attn-sparsity 0.5 --compress-cache", ["attn_sparsity", "compress_cache"]),
        ("--policy /no/such/file", ["/no/such/file"]),
        ('--policy {"w_gpu_percnt":3}', ["w_gpu_percnt", "w_gpu_percent"]),
        ("--device-memory 1MiB", ["stage 0", "--device-memory 1MiB", "at least"]),
        ("--device-memory lots", ["--device-memory", "'lots'", "512MiB"]),
        ("--offload-dir /dev/null/x", ["--offload-dir", "/dev/null is not a directory"]),
        ("--device sim: --overlap false", ["--device sim:", "policy"]),
        ("--load-format dummy opt-9b", ["opt-9b", "opt-6.7b"]),
        ("--path /no/weights facebook/opt-1.3b", ["/no/weights/opt-1.3b-np"]),
    ],
)
def test_a_mistake_in_a_policy_is_one_clear_line(arguments: str, words: list[str]) -> None:
    assert_one_clear_line(coordinator("generate", "--prompt", "a", "--quiet", *arguments.split()), *words)


def test_the_policy_of_everything_on_the_device_changes_nothing() -> None:
    command = ("generate", "--prompt", "import ", "--max-new-tokens", 8, "--json", "--ignore-eos")
    plain = json.loads(coordinator(*command).stdout)
    flags = "--percent 100 0 100 0 100 0 --gpu-batch-size 4 --num-gpu-batches 2"
    found = coordinator(*command, *flags.split())
    assert json.loads(found.stdout)["token_ids"] == plain["token_ids"]
    tiers = json.loads(found.stderr)["summary"]["stages"][0]["tiers"]
    assert tiers["weights"]["requested_percent"] == {"device": 100.0, "host": 0.0, "disk": 0.0}
    assert tiers["weights"]["bytes"].keys() == {"device", "host", "disk"}


def test_a_known_shape_needs_no_files(tmp_path: Path) -> None:
    arguments = "generate --device sim:layer_ms=0 --load-format dummy facebook/opt-30b --json --max-new-tokens 1 --stages 2"
    found = coordinator(*arguments.split(), "--prompt", "a", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert [stage["layers"] for stage in json.loads(found.stderr)["summary"]["stages"]] == [[0, 24], [24, 48]]


def test_a_derived_policy_is_in_the_log_and_in_the_status() -> None:
    async def scenario() -> tuple[asyncpipe.Policy, ...]:
        policy = asyncpipe.Policy(comp_weight_config=asyncpipe.Compression(group_size=32), overlap=False)
        async with asyncpipe.local(stages=2, policy=policy, device_memory="1GiB", host_memory="1GiB") as client:
            return tuple(stage.policy for stage in (await client.status()).stages)

    expected = asyncpipe.Policy(comp_weight_config=asyncpipe.Compression(group_size=32), overlap=False)
    assert asyncio.run(scenario()) == (expected, expected)
    line = "generate --prompt a --max-new-tokens 1 --device-memory 1GiB --log-level info"
    found = coordinator(*line.split())
    assert "stage 0: policy by its budget: weights 100 % device; cache 100 % device" in found.stderr
