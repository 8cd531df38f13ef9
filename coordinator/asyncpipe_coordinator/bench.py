"""The `bench` command: FlexLLMGen's benchmark, of prompts that differ, timed at the client, with nothing left out.

FlexLLMGen runs copies of one prompt, and its latencies are those of its own loop. Here every token is timed as it arrives.
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from asyncpipe.client import connect
from asyncpipe.errors import Invalid
from asyncpipe.process import run
from asyncpipe_coordinator.bench_metrics import (
    MIN_CUT_GEN_LEN,
    Workload,
    flexllmgen_sizes,
    measure,
    pipeline_use,
    stage_uses,
)
from asyncpipe_coordinator.bench_options import DEFAULT_PROMPT_LEN, apply_preset, settle, settle_model
from asyncpipe_coordinator.bench_plot import check_plot, draw
from asyncpipe_coordinator.bench_presets import Preset, find_preset, preset_lines
from asyncpipe_coordinator.bench_report import Breakdown, Report, append_log, as_json, log_name, report_lines
from asyncpipe_coordinator.bench_run import GatedService, Run, Runner, open_gated, random_prompts
from asyncpipe_coordinator.bench_space import Needed, check_space, kv_bytes_of_stages, needed
from asyncpipe_coordinator.config import MAX_SEQUENCES, ServiceConfig
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.core.partition import LayerRange, split_layers
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.options import config_of
from asyncpipe_coordinator.planner.stages import DTYPE_BYTES, with_derived_policies
from asyncpipe_coordinator.service import dtype_of, model_of

MAX_PROMPTS = MAX_SEQUENCES
MAX_STEP_TOKENS = 65_536
MAX_HIDDEN_BYTES = (1 << 30) - (1 << 16)  # of a step between two stages: links take frames of 1 GiB
WARM_UP_PROMPT_LEN = 32
WARM_UP_GEN_LEN = 2
LOAD_BYTES_PER_S = 50e6  # weights are made, and written, at least so fast


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, checked before any process is started."""

    name: str  # of the model
    config: ServiceConfig
    workload: Workload
    dtype: str
    warms_up: bool
    splits_phases: bool
    seed: int
    timeout_s: float
    preset: Preset | None
    log: Path | None
    plot: Path | None
    trace: str | None
    as_json: bool
    quiet: bool


def bench(arguments: argparse.Namespace) -> int:
    """Returns the exit status. Raises Invalid for a user's mistake."""
    if arguments.list_presets:
        print("\n".join(preset_lines()))
        return 0
    plan = make_plan(arguments)
    return run(lambda: _bench(plan))


async def _bench(plan: Plan) -> int:
    report = await _measure(plan)
    print(as_json(report) if plan.as_json else "\n".join(report_lines(report)))
    if plan.log is not None:
        append_log(plan.log, report)
    if plan.plot is not None:
        draw(plan.plot, report)
    return 0


async def _measure(plan: Plan) -> Report:
    async with (
        open_gated(plan.config, quiet=plan.quiet) as service,
        connect(await service.listen(f"inproc://asyncpipe-{secrets.token_hex(8)}")) as client,
    ):
        runner = Runner(service, client, plan.timeout_s, plan.quiet)
        await _check_room(plan, runner)
        if plan.warms_up:
            await _warm_up(plan, service, runner)
        prompts = _prompts(plan, service, length=plan.workload.prompt_len, seed=plan.seed)
        async with service.tracing(plan.trace):
            found = await runner.run(prompts, plan.workload.num_generated, name="measuring", split_phases=plan.splits_phases)
    return _report(plan, found, service.model)


async def _check_room(plan: Plan, runner: Runner) -> None:
    """Raises Invalid when the KV memory does not hold all blocks at once: then some would wait for others."""
    kv = (await runner.client.status()).kv
    workload = plan.workload
    wanted = workload.num_prompts * -(-(workload.prompt_len + workload.num_generated) // kv.block_tokens)
    if kv.num_blocks < wanted:
        raise Invalid(
            f"{workload.num_prompts} prompts need {wanted} blocks of {kv.block_tokens} tokens of KV memory, and there are"
            f" {kv.num_blocks}: use a larger --kv-memory, fewer sequences, or a smaller --prompt-len"
        )


async def _warm_up(plan: Plan, service: GatedService, runner: Runner) -> None:
    """A run of the same blocks with short prompts, so that memory is touched and kernels are chosen."""
    length = min(plan.workload.prompt_len, WARM_UP_PROMPT_LEN)
    prompts = _prompts(plan, service, length=length, seed=plan.seed + 1)
    await runner.run(prompts, min(plan.workload.num_generated, WARM_UP_GEN_LEN), name="warming up")


def _prompts(plan: Plan, service: GatedService, *, length: int, seed: int) -> list[tuple[int, ...]]:
    return random_prompts(plan.workload.num_prompts, length, vocab_size=service.model.vocab_size, seed=seed)


def _report(plan: Plan, found: Run, model: ModelInfo) -> Report:
    metrics = measure(plan.workload, found.arrivals_s)
    breakdown = None
    if found.between is not None:
        prefill = stage_uses(found.before, found.between, wall_s=metrics.prefill.latency_s)
        decode = stage_uses(found.between, found.after, wall_s=metrics.measured_decode.latency_s)
        breakdown = Breakdown(prefill, decode)
    return Report(
        name=plan.name,
        config=plan.config,
        dtype=plan.dtype,
        preset=plan.preset,
        workload=plan.workload,
        metrics=metrics,
        arrivals_s=found.arrivals_s,
        sizes=flexllmgen_sizes(model.shape, plan.workload),
        pipeline=pipeline_use(found.before, found.after),
        stages=stage_uses(found.before, found.after, wall_s=metrics.wall_s),
        breakdown=breakdown,
        status=found.after,
    )


# --- from arguments to a plan ---


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Changes `arguments` where a preset, or FlexLLMGen's spelling, stands for something. Raises Invalid."""
    settle_model(arguments)
    preset = find_preset(arguments.preset) if arguments.preset else None
    if preset is not None:
        apply_preset(arguments, preset)
    settle(arguments)
    wished = arguments.schedule
    arguments.schedule = wished or Schedule.STATIC.value
    config = config_of(arguments)
    model, name = model_of(config), _model_name(arguments, config)
    dtype = dtype_of(config, model)
    workload = _workload(arguments, config, model)
    if wished is None and not arguments.static:
        config = replace(config, schedule=_schedule(config, workload, model, dtype))
    splits_phases = arguments.debug_mode == "breakdown"
    if splits_phases and config.schedule is not Schedule.STATIC:
        raise Invalid(f"--debug-mode breakdown needs --schedule static, and blocks that it can take; it is {config.schedule}")
    config, space = _sized(config, workload, model, dtype, timeout_s=arguments.timeout)
    check_space(space, name=name, offload_dir=config.offload_dir)
    return Plan(
        name=name,
        config=replace(config, load_timeout_s=config.load_timeout_s + sum(space) / LOAD_BYTES_PER_S),
        workload=workload,
        dtype=dtype,
        warms_up=arguments.warm_up is not False and not arguments.no_warm_up,
        splits_phases=splits_phases,
        seed=_seed(arguments.seed),
        timeout_s=arguments.timeout,
        preset=preset,
        log=_log_path(arguments, config, workload, name),
        plot=None if arguments.plot is None else check_plot(arguments.plot),
        trace=arguments.trace,
        as_json=arguments.json,
        quiet=arguments.quiet,
    )


def _workload(arguments: argparse.Namespace, config: ServiceConfig, model: ModelInfo) -> Workload:
    gen_len, cut = arguments.gen_len, arguments.cut_gen_len
    prompt_len = arguments.prompt_len
    if prompt_len is None:
        prompt_len = max(min(DEFAULT_PROMPT_LEN, model.max_context_len - gen_len), 1)
    for flag, value in (("--prompt-len", prompt_len), ("--gen-len", gen_len)):
        if value < 1:
            raise Invalid(f"{flag} {value}: use at least 1")
    if prompt_len + gen_len > model.max_context_len:
        raise Invalid(
            f"--prompt-len {prompt_len} and --gen-len {gen_len}: together they are more than the context of"
            f" {model.max_context_len} tokens"
        )
    if cut is not None and cut < MIN_CUT_GEN_LEN:
        raise Invalid(f"--cut-gen-len {cut}: use at least {MIN_CUT_GEN_LEN}, for the first steps are not like the others")
    num_prompts = config.micro_batch_sequences * (config.num_micro_batches or config.num_stages)
    if num_prompts > MAX_PROMPTS:
        raise Invalid(
            f"{config.num_micro_batches} micro-batches of {config.micro_batch_sequences} sequences are {num_prompts} prompts;"
            f" use at most {MAX_PROMPTS}"
        )
    return Workload(
        num_prompts=num_prompts,
        prompt_len=prompt_len,
        gen_len=gen_len,
        cut_gen_len=None if cut is None or cut >= gen_len else cut,
    )


def _schedule(config: ServiceConfig, workload: Workload, model: ModelInfo, dtype: str) -> Schedule:
    """A whole block's prompts in one step, where that is possible and nothing else is asked for."""
    block_tokens = config.micro_batch_sequences * workload.prompt_len
    token_bytes = model.hidden_size * DTYPE_BYTES[dtype]
    is_small_enough = config.num_stages == 1 or block_tokens * token_bytes <= MAX_HIDDEN_BYTES
    is_wished = config.max_step_tokens is None or config.max_step_tokens >= block_tokens
    return Schedule.STATIC if is_small_enough and is_wished else Schedule.CONTINUOUS


def _sized(
    config: ServiceConfig, workload: Workload, model: ModelInfo, dtype: str, *, timeout_s: float
) -> tuple[ServiceConfig, Needed]:
    """`config` with steps, memory and deadlines for the workload, and what it needs of this machine."""
    step_tokens = min(config.micro_batch_sequences * workload.prompt_len, MAX_STEP_TOKENS)
    if config.num_stages > 1:
        step_tokens = min(step_tokens, MAX_HIDDEN_BYTES // (model.hidden_size * DTYPE_BYTES[dtype]))
    config = replace(
        config,
        max_step_tokens=step_tokens if config.max_step_tokens is None else config.max_step_tokens,
        step_timeout_s=timeout_s,
    )
    layers = split_layers(model.num_layers, config.num_stages, config.split)
    if config.simulation is not None:
        return config, Needed(0, 0)
    if config.kv_bytes is None and config.schedule is Schedule.STATIC:
        config = replace(config, kv_bytes=_kv_bytes(config, workload, model, layers, dtype))
    config = with_derived_policies(config, model, layers=layers, dtype=dtype)
    return config, needed(config, model, workload, layers, dtype=dtype)


def _kv_bytes(
    config: ServiceConfig, workload: Workload, model: ModelInfo, layers: Sequence[LayerRange], dtype: str
) -> tuple[int, ...]:
    return kv_bytes_of_stages(model, workload, layers, dtype=dtype, block_tokens=config.kv_block_tokens)


def _model_name(arguments: argparse.Namespace, config: ServiceConfig) -> str:
    """As the user calls it: of a hub name, what is after the slash."""
    return Path(arguments.model or "").name or config.checkpoint.name


def _seed(seed: int) -> int:
    if seed < 0:
        raise Invalid(f"--seed {seed}: use 0 or more")
    return seed


def _log_path(arguments: argparse.Namespace, config: ServiceConfig, workload: Workload, name: str) -> Path | None:
    """Raises Invalid where it cannot be written."""
    if arguments.no_log:
        return None
    path = Path(arguments.log_file or log_name(name, config.policy_of(0), workload)).expanduser()
    place = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise Invalid(f"--log-file {path} cannot be written; give another, or --no-log")
    return path
