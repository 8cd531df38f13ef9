"""Policies: what they may say, and every way to say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncpipe.errors import Invalid
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe.policy import Compression, Placement, Policy, Shares, policy_flags
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.flags import Parser, boolean
from asyncpipe_coordinator.options import add_model_options, config_of
from asyncpipe_coordinator.policy_options import chosen_policy


def config(line: str = "", *more: str) -> ServiceConfig:
    """As a command has it from the words of `line` and `more`."""
    parser = Parser(prog="test")
    add_model_options(parser)
    return config_of(parser.parse_args([*line.split(), *more]))


def policy(line: str = "", *more: str) -> Policy:
    return config(line, *more).policy_of(0)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    percents = {}
    for what in ("w", "cache", "act"):
        percents[f"{what}_gpu_percent"] = device = draw(st.floats(0, 100))
        percents[f"{what}_cpu_percent"] = draw(st.floats(0, 100 - device))
    names = ("overlap", "sep_layer", "pin_weight", "cpu_cache_compute", "compress_weight", "compress_cache")
    booleans = {name: draw(st.booleans()) for name in names}
    return Policy(
        gpu_batch_size=draw(st.integers(1, 64)),
        num_gpu_batches=draw(st.integers(1, 64)),
        **percents,
        **booleans,
        attn_sparsity=1.0 if booleans["compress_cache"] else draw(st.floats(0.001, 1.0)),
        comp_weight_config=Compression(group_size=2 * draw(st.integers(1, 2048))),
        comp_cache_config=Compression(group_size=2 * draw(st.integers(1, 2048))),
        placement=draw(st.sampled_from(Placement)),
    )


# --- what a policy may say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"w_gpu_percent": 60.0, "w_cpu_percent": 50.0}, "more than 100"),
        ({"cache_gpu_percent": -1.0}, "use percentages"),
        ({"act_gpu_percent": 101.0}, "use percentages"),
        ({"w_gpu_percent": float("nan")}, "use percentages"),
        ({"gpu_batch_size": 0}, "gpu_batch_size is 0"),
        ({"num_gpu_batches": 5000}, "num_gpu_batches is 5000"),
        ({"gpu_batch_size": 100, "num_gpu_batches": 100}, "10000; use at most 4096"),
        ({"attn_sparsity": 0.0}, "attn_sparsity is 0.0"),
        ({"attn_sparsity": float("nan")}, "attn_sparsity is nan"),
        ({"attn_sparsity": 0.5, "compress_cache": True}, "exclude each other"),
    ],
)
def test_a_policy_that_cannot_be_says_why(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Invalid, match=words):
        Policy(**fields)


@pytest.mark.parametrize("fields", [{"num_bits": 3}, {"group_size": 63}, {"group_size": 0}, {"group_size": 8192}])
def test_a_compression_that_cannot_be_says_why(fields: dict[str, int]) -> None:
    with pytest.raises(Invalid, match="compression"):
        Compression(**fields)


def test_what_is_neither_on_the_device_nor_on_the_host_is_on_disk() -> None:
    found = Policy(w_gpu_percent=20, w_cpu_percent=50, cache_gpu_percent=0, cache_cpu_percent=100)
    assert found.weights == Shares(20, 50, 30)
    assert (found.cache, found.activations) == (Shares(0, 100, 0), Shares(100, 0, 0))
    assert (found.w_disk_percent, found.cache_disk_percent, found.act_disk_percent) == (30, 0, 0)


@pytest.mark.parametrize("device", [33.3, 33.33, 66.6, 0.1, 14.29])
def test_percentages_that_add_up_to_100_but_for_rounding_leave_nothing_on_disk(device: float) -> None:
    found = Policy(cache_gpu_percent=device, cache_cpu_percent=round(100 - device, 2))
    assert found.cache.disk == 0.0


# --- flags ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(wanted=policies())
def test_a_policy_comes_back_from_its_flags(wanted: Policy) -> None:
    assert policy("", *policy_flags(wanted)) == wanted


def test_a_policy_of_defaults_needs_no_flags() -> None:
    assert policy_flags(Policy()) == []
    assert policy() == Policy()


def test_flags_are_those_that_flexllmgen_has() -> None:
    found = policy(
        "--percent 20 80 0 100 0 100 --gpu-batch-size 48 --num-gpu-batches 3 --cpu --compress-w --sep-layer False"
        " --overlap no --pin-weight 0 --attn-sparsity 0.5 --placement flexllmgen"
    )
    assert found == Policy(
        gpu_batch_size=48,
        num_gpu_batches=3,
        w_gpu_percent=20,
        w_cpu_percent=80,
        cache_gpu_percent=0,
        cache_cpu_percent=100,
        act_gpu_percent=0,
        act_cpu_percent=100,
        overlap=False,
        sep_layer=False,
        pin_weight=False,
        cpu_cache_compute=True,
        attn_sparsity=0.5,
        compress_weight=True,
        placement=Placement.FLEXLLMGEN,
    )


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("YES", True), ("false", False), ("0", False), ("no", False)]
)
def test_switches_take_true_and_false_in_the_usual_words(text: str, value: bool) -> None:
    assert boolean(text) is value
    assert policy("--compress-weight", text).compress_weight is value
    assert policy(f"--overlap={text}").overlap is value


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        ("--compress-weight", Policy(compress_weight=True)),
        ("--cpu-cache-compute", Policy(cpu_cache_compute=True)),
        ("--cpu", Policy(cpu_cache_compute=True)),
        ("--overlap", Policy()),
    ],
)
def test_a_bare_switch_does_not_take_the_model_for_its_value(switch: str, expected: Policy) -> None:
    found = config(switch, str(BUNDLED_MODEL))
    assert (found.checkpoint, found.policy_of(0)) == (BUNDLED_MODEL, expected)


def test_flags_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCPIPE_PERCENT", "20 80 0 100 0 100")
    monkeypatch.setenv("ASYNCPIPE_COMPRESS_WEIGHT", "yes")
    monkeypatch.setenv("ASYNCPIPE_GPU_BATCH_SIZE", "7")
    found = policy()
    assert (found.weights, found.cache, found.activations) == (Shares(20, 80, 0), Shares(0, 100, 0), Shares(0, 100, 0))
    assert (found.compress_weight, found.gpu_batch_size) == (True, 7)
    assert policy("--compress-weight", "false").compress_weight is False


def test_six_numbers_in_the_environment_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCPIPE_PERCENT", "20 80")
    with pytest.raises(Invalid, match="--percent 20 80: write six numbers"):
        policy()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--device-memory 1GiB --percent 100 0 100 0 100 0", "--device-memory with --percent"),
        ('--device-memory 1GiB --host-memory 1GiB --policy {"w_cpu_percent":0}', "and --host-memory with w_cpu_percent"),
        ("--host-memory 1GiB", "give that too"),
        ("--device-memory 1GiB --placement flexllmgen", "use --placement exact"),
        ("--device sim: --compress-weight", "simulated stages hold nothing"),
        ("--device sim: --device-memory 1GiB", "simulated stages hold nothing"),
        ("--max-sequences 9 --gpu-batch-size 4 --num-gpu-batches 2", "4 x 2 = 8 sequences"),
        ("--max-sequences 9 --gpu-batch-size 32", "32 x 1 = 32 sequences"),
        ("--placement nearest", "use one of exact, flexllmgen"),
        ("--load-format random", "use one of auto, dummy"),
    ],
)
def test_flags_that_contradict_each_other_say_so(flags: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        config(flags)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_json_or_toml(tmp_path: Path) -> None:
    wanted = Policy(w_gpu_percent=20, w_cpu_percent=80, overlap=False, comp_weight_config=Compression(group_size=32))
    (tmp_path / "policy.json").write_text(
        '{"w_gpu_percent": 20, "w_cpu_percent": 80.0, "overlap": false, "comp_weight_config": {"group_size": 32}}'
    )
    (tmp_path / "policy.toml").write_text(
        "w_gpu_percent = 20\nw_cpu_percent = 80.0\noverlap = false\n[comp_weight_config]\ngroup_size = 32\n"
    )
    for name in ("policy.json", "policy.toml"):
        assert policy("--policy", str(tmp_path / name)) == wanted
    assert policy("--policy", (tmp_path / "policy.json").read_text()) == wanted


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text('{"w_gpu_percent": 20, "compress_weight": true, "gpu_batch_size": 4, "placement": "flexllmgen"}')
    found = config("--percent 10 90 100 0 100 0 --compress-weight no --policy", str(file))
    assert found.policy_of(0) == Policy(gpu_batch_size=4, w_gpu_percent=10, w_cpu_percent=90, placement=Placement.FLEXLLMGEN)
    assert found.micro_batch_sequences == 4


def test_a_file_may_have_a_policy_for_each_stage(tmp_path: Path) -> None:
    stages = [{"w_gpu_percent": 50, "w_cpu_percent": 50}, {"compress_weight": True}]
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"stages": stages}))
    (tmp_path / "policy.toml").write_text(
        "[[stages]]\nw_gpu_percent = 50\nw_cpu_percent = 50\n[[stages]]\ncompress_weight = true\n"
    )
    for path in (file, tmp_path / "policy.toml"):
        found = config("--stages 2 --overlap false --policy", str(path))
        assert found.policy_of(0) == Policy(w_gpu_percent=50, w_cpu_percent=50, overlap=False)
        assert found.policy_of(1) == Policy(compress_weight=True, overlap=False)
    with pytest.raises(Invalid, match="2 stages for --stages 3"):
        config("--stages 3 --policy", str(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"w_gpu_percnt": 3}', "there is no 'w_gpu_percnt'; did you mean w_gpu_percent?"),
        ('{"comp_cache_config": {"groups": 3}}', "comp_cache_config: there is no 'groups'; did you mean group_size?"),
        ('{"comp_cache_config": 3}', "comp_cache_config is 3"),
        ('{"comp_weight_config": {"group_size": 3}}', "groups of 3"),
        ('{"zzz": 3}', "there is no 'zzz'; there are act_cpu_percent"),
        ('{"overlap": 1}', "overlap is 1; use true or false"),
        ('{"overlap": "true"}', 'overlap is "true"; use true or false'),
        ('{"gpu_batch_size": 1.5}', "gpu_batch_size is 1.5; use a whole number"),
        ('{"w_gpu_percent": true}', "w_gpu_percent is true; use a number"),
        ('{"placement": "best"}', "use one of exact, flexllmgen"),
        ('{"stages": []}', "write a list of policies"),
        ('{"stages": [3]}', "stage 0 is 3; write an object"),
        ('{"stages": [{"overlap": 1}]}', "stage 0: overlap is 1"),
        ('{"stages": [{}], "overlap": true}', "overlap stand beside stages"),
        ("[1, 2]", "write an object"),
        ("w_gpu_percent = 20", "cannot be read as JSON .the name of a TOML file ends with .toml"),
    ],
)
def test_a_file_with_a_mistake_is_explained(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "policy.json"
    file.write_text(text)
    with pytest.raises(Invalid, match=words.replace("?", "[?]")) as found:
        policy("--policy", str(file))
    assert "\n" not in str(found.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.toml").write_text("= 3")
    for name, words in (("nowhere", "No such file"), ("bytes", "is not text"), ("bad.toml", "as TOML"), ("", "directory")):
        with pytest.raises(Invalid, match=words):
            policy("--policy", str(tmp_path / name))


# --- what follows from a policy ---------------------------------------------------------------------------------------


def test_a_micro_batch_is_a_policys_block() -> None:
    assert config().micro_batch_sequences == 32
    assert config("--gpu-batch-size 4 --num-gpu-batches 3").micro_batch_sequences == 12
    assert config("--gpu-batch-size 4 --num-gpu-batches 3 --max-sequences 12").micro_batch_sequences == 12
    assert config("--num-gpu-batches 2").micro_batch_sequences == 64


def test_without_batches_a_policys_block_is_a_micro_batch() -> None:
    found = config("--max-sequences 5 --compress-weight")
    assert found.policy_of(0) == Policy(gpu_batch_size=5, num_gpu_batches=1, compress_weight=True)
    with pytest.raises(Invalid, match="3 x 2 = 6; they must be equal"):
        ServiceConfig(checkpoint=BUNDLED_MODEL, max_sequences=5, policy=Policy(gpu_batch_size=3, num_gpu_batches=2))
    with pytest.raises(Invalid, match="they must be equal"):
        ServiceConfig(checkpoint=BUNDLED_MODEL, num_stages=2, policy=(Policy(gpu_batch_size=3), Policy(gpu_batch_size=4)))


def test_steps_are_larger_and_may_take_longer_where_bytes_are_moved_for_them() -> None:
    resident, weights = config(), config("--percent 50 50 100 0 100 0")
    cache = config("--percent 100 0 0 100 100 0")
    assert (resident.step_tokens, weights.step_tokens, cache.step_tokens) == (512, 4096, 512)
    assert (resident.step_deadline_s, weights.step_deadline_s, cache.step_deadline_s) == (120, 3600, 3600)
    assert config("--compress-weight --max-step-tokens 64").step_tokens == 64
    assert ServiceConfig(checkpoint=BUNDLED_MODEL, step_timeout_s=5.0, policy=weights.policy).step_deadline_s == 5


def test_an_offload_directory_is_there_or_can_be_made(tmp_path: Path) -> None:
    assert config("--offload-dir", str(tmp_path / "new" / "place")).offload_dir == tmp_path / "new" / "place"
    (tmp_path / "file").write_text("")
    with pytest.raises(Invalid, match="file is not a directory"):
        config("--offload-dir", str(tmp_path / "file" / "place"))


def test_the_first_mistake_is_found_before_a_model_is_looked_for() -> None:
    parser = Parser(prog="test")
    add_model_options(parser)
    with pytest.raises(Invalid, match="six numbers"):
        chosen_policy(parser.parse_args(["no/such-model", "--percent", *"abcdef"]))
