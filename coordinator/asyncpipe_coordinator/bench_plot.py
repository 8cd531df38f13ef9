"""A benchmark's picture: steps over time, prefill beside decode, what the stages did. Needs matplotlib, the extra `bench`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncpipe.errors import Invalid
from asyncpipe_coordinator.bench_metrics import step_times
from asyncpipe_coordinator.bench_report import Report, stage_parts

MAX_BLOCKS_SHOWN = 8
SIZE_INCHES = (10.0, 9.0)
COLORS = {
    "compute_s": "#2b6cb0",
    "load_weight_s": "#dd6b20",
    "load_cache_s": "#b83280",
    "store_cache_s": "#ed90c4",
    "activations_s": "#d69e2e",
    "idle_s": "#e2e8f0",
}
ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
PREFILL, DECODE, PROJECTED = "#2f855a", "#2b6cb0", "#bee3f8"


def check_plot(file: str) -> Path:
    """Before the run. Raises Invalid where it cannot be drawn or written."""
    path = Path(file).expanduser()
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise Invalid(f"--plot {file}: give a name that ends in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise Invalid("--plot needs matplotlib: pip install 'asyncpipe-runtime[bench]'")
    if not os.access(path.absolute().parent, os.W_OK):
        raise Invalid(f"--plot {file}: {path.absolute().parent} is no directory to write to")
    return path


def draw(path: Path, report: Report) -> None:
    """Raises Invalid when it cannot be written."""
    # Imported by name, for it is an extra; Figure alone, without pyplot, needs no display.
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=SIZE_INCHES, layout="constrained")
    rows = figure.subplots(3, 1, height_ratios=(3, 1, 1 + 0.4 * len(report.stages)))
    figure.suptitle(_title(report), fontsize=10)
    _draw_steps(rows[0], report)
    _draw_phases(rows[1], report)
    _draw_stages(rows[2], report)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise Invalid(f"cannot write the picture {path}: {error.strerror or error}") from None


def _title(report: Report) -> str:
    workload, total = report.workload, report.metrics.total
    projected = ", projected" if report.metrics.projected else ""
    return (
        f"{report.name}, stages: {report.config.num_stages}, {workload.num_prompts} prompts of {workload.prompt_len} tokens,"
        f" {workload.gen_len} generated\n{total.tokens_per_s:.2f} tokens/s in all{projected}"
    )


def _draw_steps(axes: Any, report: Report) -> None:
    """Of each decode step, how long after the one before it all of a block's requests had their tokens."""
    tokens = range(2, report.workload.num_generated + 1)
    blocks = _blocks(report)
    for number, block in enumerate(blocks[:MAX_BLOCKS_SHOWN]):
        axes.plot(
            tokens, [1000 * step for step in block], color=DECODE, alpha=0.35, linewidth=1, label=_block_label(number, blocks)
        )
    axes.plot(tokens, [1000 * step for step in report.metrics.step_s[1:]], color="black", marker=".", label="all requests")
    axes.set_ylabel("ms since the token before")
    axes.set_xlabel("token (the first comes with prefill)")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True)
    if report.metrics.projected:
        _draw_projection(axes, report)
    axes.legend(fontsize=8)


def _draw_projection(axes: Any, report: Report) -> None:
    workload, metrics = report.workload, report.metrics
    rest_s = metrics.decode.latency_s - metrics.measured_decode.latency_s
    mean_ms = 1000 * rest_s / (workload.gen_len - workload.num_generated)
    ends = (workload.num_generated, workload.gen_len)
    axes.plot(ends, (mean_ms, mean_ms), color="black", linestyle=":", label="projected")


def _block_label(number: int, blocks: Sequence[Any]) -> str | None:
    if number:
        return None
    return "each block" if len(blocks) <= MAX_BLOCKS_SHOWN else f"the first {MAX_BLOCKS_SHOWN} blocks"


def _blocks(report: Report) -> list[list[float]]:
    """Seconds of each decode step, of the requests that began together."""
    size = report.policy.block_size
    blocks = []
    for first in range(0, len(report.arrivals_s), size):
        ends_s = [max(times) for times in zip(*report.arrivals_s[first : first + size], strict=True)]
        blocks.append(step_times(ends_s))
    return blocks


def _draw_phases(axes: Any, report: Report) -> None:
    metrics = report.metrics
    prefill_s, measured_s = metrics.prefill.latency_s, metrics.measured_decode.latency_s
    axes.barh(0, prefill_s, color=PREFILL, label=f"prefill {prefill_s:.3g} s")
    axes.barh(0, measured_s, left=prefill_s, color=DECODE, label=f"decode {measured_s:.3g} s")
    if metrics.projected:
        rest_s = metrics.decode.latency_s - measured_s
        axes.barh(0, rest_s, left=prefill_s + measured_s, color=PROJECTED, hatch="//", label=f"projected {rest_s:.3g} s")
    axes.set_yticks([])
    axes.set_xlabel("seconds")
    axes.legend(fontsize=8, ncols=3, **ABOVE)


def _draw_stages(axes: Any, report: Report) -> None:
    names = [f"stage {use.stage}" for use in report.stages]
    lefts = [0.0] * len(names)
    for parts in zip(*map(stage_parts, report.stages), strict=True):
        seconds = [part.seconds for part in parts]
        if any(seconds):
            axes.barh(names, seconds, left=lefts, color=COLORS[parts[0].name], label=parts[0].words)
        lefts = [left + value for left, value in zip(lefts, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the measured run")
    axes.legend(fontsize=8, ncols=len(COLORS), **ABOVE)
