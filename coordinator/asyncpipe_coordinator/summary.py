"""What a command says at its end: tokens, times, and how well the stages were used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asyncpipe.wire.messages import StageStatus, Status, Usage
from asyncpipe_coordinator.tier_lines import tiers_object


@dataclass(slots=True)
class Tally:
    """Counts of the requests of a run; `seconds` is the whole run."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    first_token_s: float | None = None

    def add(self, usage: Usage) -> None:
        """A finished request."""
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        first_s = usage.time_to_first_token_s
        self.first_token_s = first_s if self.first_token_s is None else min(self.first_token_s, first_s)

    def add_failed(self) -> None:
        self.requests += 1
        self.failed += 1


def summarize(tally: Tally, status: Status | None) -> dict[str, Any]:
    """Seconds and tokens/s over the whole run; the earliest first token of all requests; shares of the time with work."""
    rate = tally.completion_tokens / tally.seconds if tally.seconds else 0.0
    summary: dict[str, Any] = {
        "requests": tally.requests,
        "failed": tally.failed,
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "seconds": round(tally.seconds, 4),
        "tokens_per_s": round(rate, 2),
        "time_to_first_token_s": round(tally.first_token_s or 0.0, 4),
    }
    return summary if status is None else summary | _pipeline(status) | {"stages": [_stage(stage) for stage in status.stages]}


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [
        f"{summary['completion_tokens']} tokens in {summary['seconds']:.2f} s · {summary['tokens_per_s']:.1f} tokens/s"
        f" · first token after {summary['time_to_first_token_s'] * 1000:.0f} ms"
    ]
    stages = summary.get("stages", [])
    if stages:
        busy = ", ".join(f"stage {stage['stage']} {stage['busy_share']:.0%}" for stage in stages[:8])
        more = f" … and {len(stages) - 8} more" if len(stages) > 8 else ""
        lines.append(
            f"busy: {busy}{more} · bubble {summary['bubble']:.0%} · efficiency {summary['efficiency']:.2f}"
            f" with {summary['micro_batches']} micro-batches"
        )
    return lines


def _pipeline(status: Status) -> dict[str, Any]:
    pipeline = status.pipeline
    return {
        "micro_batches": pipeline.num_micro_batches,
        "steps": pipeline.steps,
        "ideal_s": round(pipeline.ideal_s, 4),
        "measured_s": round(pipeline.measured_s, 4),
        "efficiency": round(pipeline.efficiency, 4),
        "bubble": round(pipeline.bubble, 4),
        "step_round_trip_s": round(pipeline.round_trip_s, 6),
        "step_overhead_s": round(pipeline.overhead_s, 6),
        "preemptions": status.kv.preemptions,
    }


def _stage(stage: StageStatus) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "layers": list(stage.layers),
        "num_params": stage.num_params,
        "busy_share": round(stage.busy_share, 4),
        "busy_s": round(stage.busy_s, 4),
        "idle_s": {
            "starved": round(stage.idle.starved_s, 4),
            "send_wait": round(stage.idle.send_wait_s, 4),
            "no_work": round(stage.idle.no_work_s, 4),
        },
        "kv_blocks": stage.kv_blocks,
        "tiers": tiers_object(stage),
        "io_wait_s": round(stage.transfers.wait_s, 4),
        "io_bytes": stage.transfers.num_bytes,
    }
