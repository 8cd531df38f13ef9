"""Draws what the stages of a pipeline do, for the README: one micro-batch, one a stage with a barrier, and an automatic number.

    python benchmarks/picture.py docs/pipeline.png

The same work, on four simulated stages whose times vary, three times; each row is a stage, each bar a step, coloured by its
micro-batch. The figures are measured in the same runs. Needs matplotlib: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from asyncpipe import Client, connect
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.service import Service

STAGES = 4
DEVICE = "sim:layer_ms=10,jitter=0.3"
SEQUENCES = 4  # in a micro-batch
REQUESTS = 40
SHOWN_S = 0.7
BEGIN_S = 0.6  # when all of them have reached their pace


class Run(NamedTuple):
    title: str
    micro_batches: int | None
    schedule: Schedule


class Bar(NamedTuple):
    """A step of a micro-batch on a stage, in seconds since the run began."""

    stage: int
    micro_batch: int
    start_s: float
    duration_s: float


class Outcome(NamedTuple):
    bars: list[Bar]
    tokens_per_s: float
    bubble: float


RUNS = (
    Run("one micro-batch", 1, Schedule.CONTINUOUS),
    Run("a micro-batch for each stage, and a barrier", STAGES, Schedule.BARRIER),
    Run("automatic, no barrier", None, Schedule.CONTINUOUS),
)


async def measure(run: Run) -> Outcome:
    config = ServiceConfig(
        checkpoint=BUNDLED_MODEL,
        num_stages=STAGES,
        num_micro_batches=run.micro_batches,
        max_sequences=SEQUENCES,
        schedule=run.schedule,
        device=DEVICE,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        async with Service.open(config) as service, connect(await service.listen(f"memory://{id(run)}")) as client:
            await decode(client)  # the number of micro-batches settles
            before = await client.status()
            async with service.tracing(str(path)):
                await decode(client)
            after = await client.status()
        bars = read_bars(path)
    measured_s = after.pipeline.measured_s - before.pipeline.measured_s
    busy_s = sum(stage.busy_s for stage in after.stages) - sum(stage.busy_s for stage in before.stages)
    return Outcome(
        bars,
        tokens_per_s=(after.generated_tokens - before.generated_tokens) / measured_s,
        bubble=1 - busy_s / (STAGES * measured_s),
    )


async def decode(client: Client) -> None:
    await asyncio.gather(*(client.generate([5, number], max_new_tokens=20 + number % 7) for number in range(REQUESTS)))


def read_bars(path: Path) -> list[Bar]:
    """The compute spans of a trace."""
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["name"].startswith("micro-batch")]
    begin_us = min(event["ts"] for event in spans)
    return [
        Bar(event["pid"], event["args"]["micro_batch"], (event["ts"] - begin_us) / 1e6, event["dur"] / 1e6) for event in spans
    ]


def draw(outcomes: list[Outcome], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    colours = plt.get_cmap("tab10").colors
    figure, axes = plt.subplots(len(RUNS), 1, figsize=(10, 5.2), sharex=True, layout="constrained")
    for axis, run, outcome in zip(axes, RUNS, outcomes, strict=True):
        for bar in outcome.bars:
            start_ms, duration_ms = (bar.start_s - BEGIN_S) * 1000, bar.duration_s * 1000
            if start_ms + duration_ms > 0 and start_ms < SHOWN_S * 1000:
                axis.broken_barh(
                    [(start_ms, duration_ms)],
                    (bar.stage - 0.42, 0.84),
                    facecolor=colours[bar.micro_batch % len(colours)],
                    edgecolor="white",
                    linewidth=0.4,
                )
        axis.set_title(
            f"{run.title}: {outcome.tokens_per_s:.0f} tokens/s, {outcome.bubble:.0%} of the stages' time idle",
            loc="left",
            fontsize=10,
        )
        axis.set_yticks(range(STAGES), [f"stage {stage}" for stage in range(STAGES)], fontsize=8)
        axis.set_ylim(STAGES - 0.5, -0.5)
        axis.set_xlim(0, SHOWN_S * 1000)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("docs/pipeline.png"), help="default: docs/pipeline.png")
    parser.add_argument("--quick", action="store_true", help="accepted for uniformity: a run takes about 20 s anyway")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    outcomes = [uvloop.run(measure(run)) for run in RUNS]
    draw(outcomes, arguments.output)
    figures = {
        run.title: {"tokens_per_s": round(outcome.tokens_per_s, 1), "bubble": round(outcome.bubble, 3)}
        for run, outcome in zip(RUNS, outcomes, strict=True)
    }
    print(json.dumps(figures, indent=2) if arguments.json else "\n".join(f"{name}: {found}" for name, found in figures.items()))


if __name__ == "__main__":
    main()
