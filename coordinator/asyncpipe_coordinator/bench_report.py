"""A benchmark's report: text that resembles FlexLLMGen's, JSON, and the log file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from asyncpipe.errors import Invalid
from asyncpipe.policy import PERCENT_FIELDS, Policy, policy_flags
from asyncpipe.wire.messages import Moved, StageStatus, Status
from asyncpipe_coordinator.bench_metrics import Metrics, PipelineUse, Rate, Sizes, Spread, StageUse, Workload
from asyncpipe_coordinator.bench_presets import Preset
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.tier_lines import policy_text, size_text, tiers_object, tiers_text

GIB = 1 << 30
MAX_STAGES_SHOWN = 16


class Part(NamedTuple):
    """A share of a stage's time. `name` is of the JSON, `words` of the text and the picture."""

    name: str
    words: str
    seconds: float


class Breakdown(NamedTuple):
    """What each stage did in each phase."""

    prefill: Sequence[StageUse]
    decode: Sequence[StageUse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that is shown. `stages` are over the measured run, `status` was read at its end."""

    name: str
    config: ServiceConfig
    dtype: str
    preset: Preset | None
    workload: Workload
    metrics: Metrics
    arrivals_s: Sequence[Sequence[float]]
    sizes: Sizes
    pipeline: PipelineUse
    stages: Sequence[StageUse]
    breakdown: Breakdown | None
    status: Status

    @property
    def policy(self) -> Policy:
        """Of the first stage; mostly of all."""
        return self.config.policy_of(0)

    @property
    def peak_device_bytes(self) -> int:
        return max(stage.peak_device_bytes for stage in self.status.stages)

    @property
    def peak_host_bytes(self) -> int:
        """Of a worker process."""
        return max(stage.peak_host_bytes for stage in self.status.stages)


def stage_parts(use: StageUse) -> tuple[Part, ...]:
    """They add up to the stage's time."""
    return (
        Part("compute_s", "computing", use.compute_s),
        Part("load_weight_s", "loading weights", use.moved.weights.wait_s),
        Part("load_cache_s", "loading cache", use.moved.cache_loads.wait_s),
        Part("store_cache_s", "storing cache", use.moved.cache_stores.wait_s),
        Part("activations_s", "activations", use.moved.activations.wait_s),
        Part("idle_s", "idle", use.idle_s),
    )


# --- text ---


def report_lines(report: Report) -> list[str]:
    """For people."""
    return [
        _headline(report),
        f"policy: {_policy_line(report)}",
        *_flexllmgen_lines(report),
        *_preset_lines(report),
        *_own_lines(report),
        *(line for index in range(min(len(report.stages), MAX_STAGES_SHOWN)) for line in _stage_lines(report, index)),
        *_breakdown_lines(report.breakdown),
    ]


def _headline(report: Report) -> str:
    workload, config, policy = report.workload, report.config, report.policy
    weights = "dummy weights, " if config.dummy_weights else ""
    return (
        f"{report.name} ({weights}{report.dtype}, {config.device}), stages: {config.num_stages},"
        f" {workload.num_prompts} prompts = {policy.gpu_batch_size} x {policy.num_gpu_batches} x"
        f" {report.pipeline.num_micro_batches} micro-batches, prompt"
        f" {workload.prompt_len}, gen {workload.gen_len}, {config.schedule} schedule"
    )


def _policy_line(report: Report) -> str:
    flags = " ".join(policy_flags(report.policy))
    return f"{policy_text(report.policy)}{f' ({flags})' if flags else ''}"


def _flexllmgen_lines(report: Report) -> list[str]:
    metrics, sizes = report.metrics, report.sizes
    mark = " (projected)" if metrics.projected else ""
    lines = [
        f"model size: {sizes.model / GIB:.3f} GiB\tcache size: {sizes.cache / GIB:.3f} GiB\t"
        f"hidden size (prefill): {sizes.hidden / GIB:.3f} GiB",
        f"peak gpu mem: {report.peak_device_bytes / GIB:.3f} GiB\tpeak host mem: {report.peak_host_bytes / GIB:.3f} GiB\t"
        f"projected: {metrics.projected}",
        _rate_line("prefill", metrics.prefill),
        _rate_line("decode", metrics.decode) + mark,
        _rate_line("total", metrics.total) + mark,
    ]
    if metrics.projected:
        cut, gen_len = report.workload.num_generated, report.workload.gen_len
        lines += [
            f"measured, with {cut} of {gen_len} tokens; the rest is projected from the mean of its steps:",
            f"  {_rate_line('decode', metrics.measured_decode)}",
            f"  {_rate_line('total', metrics.measured_total)}",
        ]
    return lines


def _rate_line(name: str, rate: Rate) -> str:
    return f"{name} latency: {rate.latency_s:.3f} s\t{name} throughput: {rate.tokens_per_s:.3f} token/s"


def _preset_lines(report: Report) -> list[str]:
    if report.preset is None:
        return []
    projected = ", projected" if report.preset.is_projected else ""
    return [f"for reference: {report.preset.published_tokens_per_s:g} token/s total ({report.preset.published_by}{projected})"]


def _own_lines(report: Report) -> list[str]:
    metrics, pipeline = report.metrics, report.pipeline
    return [
        f"time to first token: {_spread_text(metrics.first_token_s)}",
        f"time per output token: {_spread_text(metrics.per_token_s)}",
        f"end to end: {metrics.wall_s:.3f} s measured, {report.workload.num_prompts * report.workload.num_generated} tokens",
        f"pipeline: efficiency {pipeline.efficiency:.2f}, bubble {pipeline.bubble:.0%}, {pipeline.steps} steps"
        + (f", {pipeline.preemptions} preemptions" if pipeline.preemptions else ""),
    ]


def _spread_text(spread: Spread) -> str:
    return f"p50 {1000 * spread.p50:.1f} ms, p95 {1000 * spread.p95:.1f} ms"


def _stage_lines(report: Report, index: int) -> Iterator[str]:
    use, found = report.stages[index], report.status.stages[index]
    first, last = found.layers
    peaks = f"peak host {size_text(found.peak_host_bytes)}"
    if found.peak_device_bytes:
        peaks += f", device {size_text(found.peak_device_bytes)}"
    yield f"stage {use.stage}: layers {first}-{last - 1} on {found.device}; {_parts_text(use)}; {peaks}"
    if tiers := tiers_text(found.tiers):
        if found.policy != report.policy:
            yield f"  policy: {policy_text(found.policy)}"
        yield f"  placed: {tiers}"
    if use.moved.num_bytes:
        exposed = f"{use.moved.wait_s:.3f} s, {use.exposed_share:.1%} of the time"
        yield f"  moved {size_text(use.moved.num_bytes)}; exposed I/O {exposed}"


def _parts_text(use: StageUse) -> str:
    shown = [part for part in stage_parts(use) if part.seconds >= 0.0005 or part.name in ("compute_s", "idle_s")]
    return ", ".join(f"{part.words} {part.seconds:.3f} s" for part in shown)


def _breakdown_lines(breakdown: Breakdown | None) -> list[str]:
    """Without overlap, waits are all that transfers take."""
    if breakdown is None:
        return []
    return [
        f"breakdown of {phase} ({uses[0].wall_s:.3f} s), stage {use.stage}: "
        + ", ".join(f"{part.words} {part.seconds:.3f} s" for part in stage_parts(use))
        for phase, uses in zip(Breakdown._fields, breakdown, strict=True)
        for use in uses
    ]


# --- JSON ---


def as_json(report: Report) -> str:
    """One line."""
    return msgspec.json.encode(as_object(report)).decode()


def as_object(report: Report) -> dict[str, Any]:
    config, metrics, workload = report.config, report.metrics, report.workload
    found: dict[str, Any] = {
        "model": report.name,
        "dummy_weights": config.dummy_weights,
        "dtype": report.dtype,
        "device": config.device,
        "num_stages": config.num_stages,
        "schedule": config.schedule.value,
        "max_step_tokens": config.step_tokens,
        "workload": _workload_object(report),
        "policy": policy_flags(report.policy),
        "projected": metrics.projected,
        "prefill": _rate_object(metrics.prefill, projected=False),
        "decode": _rate_object(metrics.decode, projected=metrics.projected),
        "total": _rate_object(metrics.total, projected=metrics.projected),
        "measured": {
            "gen_len": workload.num_generated,
            "decode": _rate_object(metrics.measured_decode, projected=False),
            "total": _rate_object(metrics.measured_total, projected=False),
        },
        "time_to_first_token_s": metrics.first_token_s._asdict(),
        "time_per_output_token_s": metrics.per_token_s._asdict(),
        "wall_s": metrics.wall_s,
        "step_s": metrics.step_s,
        "flexllmgen_bytes": report.sizes._asdict(),
        "peak_device_bytes": report.peak_device_bytes,
        "peak_host_bytes": report.peak_host_bytes,
        "pipeline": report.pipeline,
        "stages": [_stage_object(u, f) for u, f in zip(report.stages, report.status.stages, strict=True)],
    }
    if report.preset is not None:
        found["published"] = {
            "tokens_per_s": report.preset.published_tokens_per_s,
            "by": report.preset.published_by,
            "projected": report.preset.is_projected,
        }
    if report.breakdown is not None:
        found["breakdown"] = {
            phase: [_parts_object(use) for use in uses] for phase, uses in zip(Breakdown._fields, report.breakdown, strict=True)
        }
    return found


def _workload_object(report: Report) -> dict[str, Any]:
    workload, policy = report.workload, report.policy
    return {
        "num_prompts": workload.num_prompts,
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "num_inner_iterations": report.pipeline.num_micro_batches,
        "prompt_len": workload.prompt_len,
        "gen_len": workload.gen_len,
        "cut_gen_len": workload.cut_gen_len,
    }


def _rate_object(rate: Rate, *, projected: bool) -> dict[str, Any]:
    return {"latency_s": rate.latency_s, "tokens_per_s": rate.tokens_per_s, "projected": projected}


def _stage_object(use: StageUse, found: StageStatus) -> dict[str, Any]:
    return {
        "stage": use.stage,
        "layers": found.layers,
        "num_params": found.num_params,
        **_parts_object(use),
        "io_wait_s": use.moved.wait_s,
        "io_wait_share": use.exposed_share,
        "moved": {name: _moved_object(getattr(use.moved, name)) for name in use.moved.__struct_fields__},
        "peak_host_bytes": found.peak_host_bytes,
        "peak_device_bytes": found.peak_device_bytes,
        "tiers": tiers_object(found),
    }


def _parts_object(use: StageUse) -> dict[str, Any]:
    return {"wall_s": use.wall_s} | {part.name: part.seconds for part in stage_parts(use)}


def _moved_object(moved: Moved) -> dict[str, Any]:
    return {"bytes": moved.num_bytes, "busy_s": moved.busy_s, "wait_s": moved.wait_s}


# --- the log ---


def log_name(model: str, policy: Policy, workload: Workload) -> str:
    """As FlexLLMGen names it."""
    size = model.rsplit("-", maxsplit=1)[-1].lower()
    percents = "-".join(f"{getattr(policy, name):g}" for name in PERCENT_FIELDS)
    parts = [
        f"fo-{size}-gbs{policy.gpu_batch_size}-ngbs{policy.num_gpu_batches}",
        f"prompt{workload.prompt_len}-gen{workload.gen_len}",
        f"percent-{percents}",
        "cpu-cache" if policy.cpu_cache_compute else "gpu-cache",
    ]
    if policy.compress_weight:
        parts.append("compw")
    if policy.compress_cache:
        parts.append("compc")
    return "-".join(parts) + ".log"


def append_log(path: Path, report: Report) -> None:
    """Raises Invalid when it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write("\n".join([*report_lines(report), "", ""]))
    except OSError as error:
        raise Invalid(f"cannot write the log {path}: {error.strerror or error}") from None
