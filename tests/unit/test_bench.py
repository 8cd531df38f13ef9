"""The benchmark's figures, names, presets and checks, without a pipeline."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncpipe.errors import Invalid
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe.policy import PERCENT_FIELDS, Policy
from asyncpipe.wire.messages import KVStatus, Moved, PipelineStatus, StageStatus, Status, TransferReport
from asyncpipe_coordinator import bench_space
from asyncpipe_coordinator.bench import Plan, make_plan
from asyncpipe_coordinator.bench_metrics import (
    Workload,
    flexllmgen_sizes,
    measure,
    pipeline_use,
    project,
    stage_uses,
    step_times,
)
from asyncpipe_coordinator.bench_presets import PRESETS, find_preset, preset_lines
from asyncpipe_coordinator.bench_report import log_name, stage_parts
from asyncpipe_coordinator.bench_run import Gate, GatedMachine, random_prompts
from asyncpipe_coordinator.bench_space import Needed, check_space
from asyncpipe_coordinator.cli import build_parser
from asyncpipe_coordinator.core import events
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.known_models import known_config
from asyncpipe_coordinator.policy_options import chosen_policy
from asyncpipe_coordinator.tensor_shapes import model_shape
from tests.core_machine import answer, machine, steps, submitted

GIB = 2**30
TERA = 10**12


@pytest.fixture
def much_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that holds any model."""
    monkeypatch.setattr(bench_space, "free_memory_bytes", lambda: 100 * TERA)
    monkeypatch.setattr(bench_space, "free_disk_bytes", lambda _: 100 * TERA)
    return


def parsed(flags: str) -> argparse.Namespace:
    return build_parser().parse_args(["bench", *shlex.split(flags)])


def plan(flags: str) -> Plan:
    return make_plan(parsed(f"--no-log {flags}"))


# --- metrics ---


def test_figures_of_two_requests_by_hand() -> None:
    workload = Workload(num_prompts=2, prompt_len=10, gen_len=3)
    found = measure(workload, [[1.0, 2.0, 4.0], [2.0, 3.0, 5.0]])
    assert found.step_s == (2.0, 1.0, 2.0)  # all have their first token at 2, their second at 3, their third at 5
    assert found.prefill == (2.0, 20 / 2.0)
    assert found.decode == (3.0, 2 * 2 / 3.0)
    assert found.total == (5.0, 2 * 3 / 5.0)
    assert (found.measured_decode, found.measured_total) == (found.decode, found.total)
    assert found.first_token_s.p50 == 1.5
    assert found.first_token_s.p95 == pytest.approx(1.95)
    assert found.per_token_s == (1.5, 1.5)
    assert found.wall_s == 5.0
    assert not found.projected


def test_one_token_each_has_no_decode() -> None:
    found = measure(Workload(num_prompts=1, prompt_len=4, gen_len=1), [[0.5]])
    assert found.decode == (0.0, 0.0)
    assert found.total == (0.5, 2.0)


def test_the_projection_takes_the_first_two_steps_as_they_are_and_the_mean_of_the_others() -> None:
    assert project([5.0, 4.0, 1.0, 2.0, 3.0], 31) == 5.0 + 4.0 + 2.0 * 29


def test_steps_whose_tokens_come_together_share_their_time() -> None:
    together = [1.0, 1.6, 1.60001, 1.60002, 1.8, 2.2, 2.20001]
    assert step_times(together) == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2, 0.2], abs=1e-4)


def test_projected_figures_stand_beside_the_measured_ones() -> None:
    workload = Workload(num_prompts=4, prompt_len=8, gen_len=32, cut_gen_len=5)
    found = measure(workload, [[10.0, 14.0, 17.0, 18.0, 20.0]] * 4)
    decode_s = 4.0 + 3.0 + 1.5 * 29
    assert found.projected
    assert found.decode == (decode_s, 4 * 31 / decode_s)
    assert found.total == (10.0 + decode_s, 4 * 32 / (10.0 + decode_s))
    assert found.measured_decode == (10.0, 4 * 4 / 10.0)
    assert found.measured_total == (20.0, 4 * 5 / 20.0)
    assert found.wall_s == 20.0


@pytest.mark.parametrize(
    ("size", "model_gib", "cache_kib"), [("1.3b", 2.443, 192), ("30b", 55.803, 1344), ("175b", 325.175, 4608)]
)
def test_sizes_are_by_flexllmgens_formulas(size: str, model_gib: float, cache_kib: int) -> None:
    config = known_config(f"opt-{size}")
    assert config is not None
    sizes = flexllmgen_sizes(model_shape(Path(), config), Workload(num_prompts=3, prompt_len=512, gen_len=32))
    assert sizes.model / GIB == pytest.approx(model_gib, abs=0.001)
    assert sizes.cache == 3 * 544 * cache_kib * 1024
    assert sizes.hidden == 2 * 3 * 544 * config["hidden_size"]


def status(*, busy_s: float, ideal_s: float, measured_s: float, transfers: TransferReport) -> Status:
    none = dict.fromkeys(("requests_waiting", "requests_running", "requests_finished", "requests_failed"), 0)
    return Status(
        model="m",
        state="running",
        uptime_s=9.0,
        prompt_tokens=0,
        generated_tokens=0,
        max_context_len=64,
        pipeline=PipelineStatus(
            num_micro_batches=1,
            steps=int(measured_s),
            ideal_s=ideal_s,
            measured_s=measured_s,
            efficiency=0.0,
            bubble=0.0,
            round_trip_s=0.0,
            overhead_s=0.0,
        ),
        kv=KVStatus(num_blocks=1, used_blocks=0, block_tokens=32, preemptions=0),
        stages=(
            StageStatus(
                stage=0,
                pid=1,
                device="cpu",
                host="h",
                layers=(0, 2),
                num_params=1,
                param_bytes=4,
                busy_s=busy_s,
                transfers=transfers,
            ),
        ),
        **none,
    )


def test_what_was_before_the_measured_run_does_not_count() -> None:
    before = status(busy_s=7.0, ideal_s=6.0, measured_s=8.0, transfers=TransferReport(weights=Moved(100, 3.0, 2.0)))
    moved = TransferReport(weights=Moved(150, 5.0, 3.0), cache_loads=Moved(8, 1.0, 0.5), activations=Moved(4, 0.5, 0.25))
    after = status(busy_s=10.0, ideal_s=9.0, measured_s=12.0, transfers=moved)
    (use,) = stage_uses(before, after, wall_s=5.0)
    assert use.moved.weights == Moved(50, 2.0, 1.0)
    assert use.moved.num_bytes == 62
    assert (use.busy_s, use.compute_s, use.idle_s) == (3.0, 1.25, 2.0)
    assert use.exposed_share == 1.75 / 5.0
    assert sum(part.seconds for part in stage_parts(use)) == use.wall_s
    pipeline = pipeline_use(before, after)
    assert (pipeline.steps, pipeline.efficiency, pipeline.bubble) == (4, 0.75, 0.25)


# --- requests ---


def test_prompts_differ_and_a_seed_gives_the_same_ones() -> None:
    prompts = random_prompts(200, 2, vocab_size=20, seed=3)
    assert len(set(prompts)) == 200
    assert {len(prompt) for prompt in prompts} == {2}
    assert prompts == random_prompts(200, 2, vocab_size=20, seed=3)
    assert prompts != random_prompts(200, 2, vocab_size=20, seed=4)
    with pytest.raises(Invalid, match="--prompt-len 1"):
        random_prompts(21, 1, vocab_size=20, seed=0)


def gated(**changes: Any) -> GatedMachine:
    core = GatedMachine(machine(schedule=Schedule.STATIC, max_sequences_per_micro_batch=3, **changes).limits)
    core.handle(events.PipelineReady(epoch=1, kv_blocks=1000, at_s=0.0))
    return core


def test_a_gate_makes_each_micro_batch_begin_with_a_whole_block() -> None:
    core = gated()
    core.set_gate(Gate.CLOSED)
    for number in range(6):
        assert not steps(core.handle(submitted(str(number))))
    core.set_gate(Gate.OPEN)
    issued = steps(core.handle(events.Tick(at_s=1.0)))
    assert [len(step.delta.chunks) for step in issued] == [3, 3]
    core.check()
    (again,) = steps(answer(core, issued[0], 7, 8, 9))
    assert again.delta.token_ids == (7, 8, 9)


def test_a_gate_can_end_prefill_before_decode_begins() -> None:
    core = gated()
    core.set_gate(Gate.CLOSED)
    for number in range(6):
        core.handle(submitted(str(number)))
    core.set_gate(Gate.FIRST)
    first, second = steps(core.handle(events.Tick(at_s=1.0)))
    assert not steps(answer(core, first, 7, 8, 9))
    assert not steps(answer(core, second, 4, 5, 6))
    core.set_gate(Gate.OPEN)
    assert len(steps(core.handle(events.Tick(at_s=2.0)))) == 2


# --- names and presets ---


def test_logs_are_named_as_flexllmgen_names_them() -> None:
    policy = Policy(gpu_batch_size=48, num_gpu_batches=3, w_gpu_percent=20, w_cpu_percent=80)
    policy = replace(policy, cache_gpu_percent=0, cache_cpu_percent=100, act_gpu_percent=0, act_cpu_percent=100)
    workload = Workload(num_prompts=144, prompt_len=512, gen_len=32, cut_gen_len=5)
    name = "fo-30b-gbs48-ngbs3-prompt512-gen32-percent-20-80-0-100-0-100"
    assert log_name("opt-30b", replace(policy, cpu_cache_compute=True), workload) == f"{name}-cpu-cache.log"
    packed = replace(policy, compress_weight=True, compress_cache=True)
    assert log_name("opt-30b", packed, workload) == f"{name}-gpu-cache-compw-compc.log"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_policy_that_can_be(name: str, much_room: None) -> None:
    preset = PRESETS[name]
    found = plan(f"--preset {name} --device cuda")
    policy = found.config.policy_of(0)
    assert tuple(getattr(policy, field) for field in PERCENT_FIELDS) == preset.percent
    assert all(getattr(policy, field) == value for field, value in preset.policy.items())
    assert found.config.dummy_weights
    assert found.config.num_stages == preset.stages
    block = preset.gpu_batch_size * preset.num_gpu_batches
    assert found.workload == Workload(num_prompts=block * preset.stages, prompt_len=512, gen_len=32)
    assert chosen_policy(parsed(preset.flags())) == policy  # the table's flags are the preset's


def test_flags_beside_a_preset_win(much_room: None, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text('{"num_gpu_batches": 4, "compress_weight": true, "w_gpu_percent": 10, "w_cpu_percent": 90}')
    flags = "--gpu-batch-size 2 --prompt-len 100 --stages 2 --cpu-cache-compute false --cut-gen-len 8"
    found = plan(f"opt-1.3b --preset opt-30b {flags} --policy {file} --device cuda")
    policy = found.config.policy_of(0)
    assert found.name == "opt-1.3b"
    assert (policy.gpu_batch_size, policy.num_gpu_batches, policy.cpu_cache_compute) == (2, 4, False)
    assert (policy.compress_weight, policy.w_gpu_percent, policy.cache_cpu_percent) == (True, 10, 0)
    assert found.workload == Workload(num_prompts=8, prompt_len=100, gen_len=32, cut_gen_len=8)


def test_a_directory_beside_a_preset_has_its_own_weights(much_room: None) -> None:
    found = plan(f"{BUNDLED_MODEL} --preset opt-30b --prompt-len 16")
    assert not found.config.dummy_weights


def test_the_table_of_presets_says_whose_figures_they_are() -> None:
    text = "\n".join(preset_lines())
    assert "7.32 tokens/s (FlexLLMGen on 1x T4, published, projected)" in text
    with pytest.raises(Invalid, match="did you mean opt-30b"):
        find_preset("opt-30")


# --- plans ---


def test_a_plan_by_flexllmgens_flags(much_room: None) -> None:
    flags = "--model facebook/opt-125m --path _DUMMY_ --percent 0 100 0 100 100 0 --cpu --debug fewer_batch --pin-weight 0"
    found = plan(f"{flags} --gpu-batch-size 3 --num-gpu-batches 2 --stages 2 --num-inner-iterations 4 --async-comm")
    assert found.name == "opt-125m"
    assert found.workload == Workload(num_prompts=24, prompt_len=512, gen_len=32, cut_gen_len=5)
    assert found.config.num_micro_batches == 4
    assert found.config.schedule is Schedule.STATIC
    assert found.config.max_step_tokens == 6 * 512
    assert found.warms_up


def test_breakdown_turns_overlap_off_and_splits_phases() -> None:
    found = plan("--debug-mode breakdown --prompt-len 8 --no-warm-up")
    assert found.splits_phases
    assert not found.config.policy_of(0).overlap
    assert not found.warms_up


def test_blocks_too_large_for_a_link_are_cut_up(much_room: None) -> None:
    found = plan("--preset opt-30b-4stages --device cuda").config
    assert found.schedule is Schedule.CONTINUOUS
    assert found.step_tokens * 7168 * 2 <= 2**30
    assert plan("--preset opt-175b-4stages --device cuda").config.schedule is Schedule.STATIC
    assert plan("--prompt-len 64 --max-step-tokens 100").config.schedule is Schedule.CONTINUOUS


def test_the_bundled_models_prompts_fit_its_context() -> None:
    assert plan("--gen-len 12").workload.prompt_len == 500


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--comm-device gpu", "NCCL links are not there yet; use --comm-device cpu"),
        ("--comm-device tpu", "use one of cpu, gpu"),
        ("--model opt-30b opt-125m", "--model opt-30b and MODEL opt-125m"),
        ("--micro-batches 2 --num-inner-iterations 3", "--num-inner-iterations 3 and --micro-batches 2"),
        ("--debug-mode all", "use one of breakdown, fewer_batch"),
        ("--debug-mode breakdown --overlap", "cannot be told apart"),
        ("--debug-mode breakdown --schedule continuous", "needs --schedule static"),
        ("--cut-gen-len 3", "use at least 4"),
        ("--prompt-len 0", "--prompt-len 0"),
        ("--prompt-len 500 --gen-len 13", "context of 512"),
        ("--gpu-batch-size 4000 --stages 2", "8000 prompts; use at most 4096"),
        ("--preset opt-9b", "--preset opt-9b"),
        ("--seed -1", "--seed -1"),
        ("--plot picture.bmp", "picture.bmp"),
        ("--schedule fifo", "--schedule fifo"),
    ],
)
def test_a_mistake_is_named(flags: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        plan(flags)


def test_a_log_that_cannot_be_written_is_found_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="--log-file"):
        make_plan(parsed(f"--prompt-len 8 --log-file {tmp_path / 'no' / 'such.log'}"))


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(Invalid, match=r"pip install 'asyncpipe-runtime\[bench\]'"):
        plan("--prompt-len 8 --plot picture.png")


# --- space ---


def test_what_a_model_needs_is_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_space, "free_memory_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * GIB))
    check_space(Needed(64 * GIB, 100 * GIB), name="opt-30b", offload_dir=tmp_path / "not" / "made")
    with pytest.raises(Invalid, match=r"opt-30b needs 65.0 GiB of memory, and 64.0 GiB are free"):
        check_space(Needed(65 * GIB, 0), name="opt-30b", offload_dir=None)
    with pytest.raises(Invalid, match=r"needs 101.0 GiB on disk, and 100.0 GiB are free in .*not"):
        check_space(Needed(0, 101 * GIB), name="opt-30b", offload_dir=tmp_path / "not" / "made")


def test_a_model_too_large_for_this_machine_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_space, "free_memory_bytes", lambda: 16 * GIB)
    with pytest.raises(Invalid, match=r"opt-175b needs .* of memory, and 16.0 GiB are free"):
        plan("--preset opt-175b --percent 0 100 0 100 100 0 --device cuda")
