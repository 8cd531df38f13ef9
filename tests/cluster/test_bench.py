"""The benchmark on real pipelines: short runs, whose figures must agree with each other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_command_line import assert_one_clear_line, coordinator

SHORT = ["--prompt-len", 16, "--gen-len", 4, "--gpu-batch-size", 2, "--num-gpu-batches", 2]


def ran(*flags: object, **env: str) -> subprocess.CompletedProcess[str]:
    result = coordinator("bench", *SHORT, "--quiet", *flags, **env)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result


def report(*flags: object, **env: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran("--json", "--no-log", *flags, **env).stdout)
    return found


@pytest.mark.parametrize("stages", [1, 2])
def test_figures_agree_with_each_other(stages: int) -> None:
    found = report("--stages", stages)
    assert found["workload"]["num_prompts"] == 4 * stages
    assert found["workload"]["num_inner_iterations"] == stages
    assert not found["projected"]
    prefill, decode, total = found["prefill"], found["decode"], found["total"]
    assert total["latency_s"] == pytest.approx(prefill["latency_s"] + decode["latency_s"]) == pytest.approx(found["wall_s"])
    assert prefill["tokens_per_s"] == pytest.approx(4 * stages * 16 / prefill["latency_s"])
    assert decode["tokens_per_s"] == pytest.approx(4 * stages * 3 / decode["latency_s"])
    assert total["tokens_per_s"] == pytest.approx(4 * stages * 4 / total["latency_s"])
    assert len(found["step_s"]) == 4
    assert 0 < found["time_to_first_token_s"]["p50"] <= found["time_to_first_token_s"]["p95"] <= prefill["latency_s"]
    assert 0 < found["pipeline"]["efficiency"] <= 1
    # Each micro-batch: a step for the prompts, one for each token after the first, perhaps one that only says that all left.
    assert 4 * stages <= found["pipeline"]["steps"] <= 5 * stages
    assert [stage["layers"] for stage in found["stages"]] == ([[0, 4]] if stages == 1 else [[0, 2], [2, 4]])
    for stage in found["stages"]:
        assert 0 < stage["compute_s"] < found["wall_s"]
        assert stage["tiers"]["cache"]["requested_percent"]["device"] == 100.0
        assert stage["peak_host_bytes"] > 2**20


def test_breakdown_of_an_offloaded_policy_says_where_the_time_goes() -> None:
    found = report("--percent", 0, 50, 30, 30, 100, 0, "--debug-mode", "breakdown")
    assert "--overlap false" in " ".join(found["policy"])
    (stage,) = found["stages"]
    bytes_of = stage["tiers"]["weights"]["bytes"]
    assert bytes_of["device"] == 0
    assert bytes_of["host"] == pytest.approx(bytes_of["disk"], rel=0.02)
    assert stage["moved"]["weights"]["bytes"] > 0
    assert stage["moved"]["cache_loads"]["bytes"] > 0
    (prefill,), (decode,) = found["breakdown"]["prefill"], found["breakdown"]["decode"]
    assert prefill["wall_s"] == pytest.approx(found["prefill"]["latency_s"])
    assert decode["wall_s"] == pytest.approx(found["decode"]["latency_s"])
    assert prefill["load_cache_s"] == 0.0  # nothing is there yet, and no decode step has begun
    assert decode["load_cache_s"] > 0.0
    for part in ("compute_s", "load_weight_s", "store_cache_s"):
        assert prefill[part] + decode[part] == pytest.approx(stage[part], abs=1e-6)


def test_a_cut_run_is_projected_and_says_so_in_text_log_and_picture(tmp_path: Path) -> None:
    log, picture = tmp_path / "run.log", tmp_path / "run.png"
    flags: list[object] = ["--gen-len", 40, "--cut-gen-len", 4, "--log-file", log, "--no-warm-up"]
    if importlib.util.find_spec("matplotlib"):
        flags += ["--plot", picture]
    text = ran(*flags).stdout
    for line in ("projected: True", "with 4 of 40 tokens; the rest is projected"):
        assert line in text
    rates = [line for line in text.splitlines() if line.startswith(("decode latency", "total latency"))]
    assert len(rates) == 2
    assert all(line.endswith("(projected)") for line in rates)
    assert log.read_text() == text + "\n"
    assert "--plot" not in flags or picture.read_bytes().startswith(b"\x89PNG")


def test_a_known_shape_needs_no_files(tmp_path: Path) -> None:
    flags = "facebook/opt-125m --load-format dummy --prompt-len 4 --gen-len 2 --gpu-batch-size 1 --num-gpu-batches 1"
    found = report(*flags.split(), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert found["model"] == "opt-125m"
    assert found["dummy_weights"]
    assert found["flexllmgen_bytes"]["cache"] == 4 * 12 * 768 * 6
    assert found["flexllmgen_bytes"]["model"] == pytest.approx(2 * found["stages"][0]["num_params"], rel=0.02)


def test_a_log_is_named_by_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran("--device", "sim:layer_ms=0", "--gpu-batch-size", 32, "--num-gpu-batches", 1)
    (log,) = tmp_path.iterdir()
    assert log.name == "fo-bundled_model-gbs32-ngbs1-prompt16-gen4-percent-100-0-100-0-100-0-gpu-cache.log"


def test_presets_are_listed() -> None:
    result = coordinator("bench", "--list-presets")
    assert result.returncode == 0
    assert "opt-175b-compressed" in result.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--comm-device gpu", ["--comm-device gpu", "--comm-device cpu"]),
        ("--gen-len many", ["--gen-len", "'many'"]),
        ("--kv-memory 400KiB", ["blocks of 32 tokens", "--kv-memory"]),
    ],
)
def test_a_mistake_is_one_clear_line(flags: str, words: list[str]) -> None:
    assert_one_clear_line(coordinator("bench", *SHORT, "--quiet", "--no-log", *flags.split()), *words)
