"""What a coordinator is told at its start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from asyncpipe.errors import Invalid
from asyncpipe.simulation import Simulation, is_simulation
from asyncpipe.wire.messages import MAX_CONTEXT_TOKENS
from asyncpipe_coordinator.core.limits import Schedule

MAX_STAGES = 256
MAX_MICRO_BATCHES = 1024
MAX_SEQUENCES = 4096
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Validated on creation: raises Invalid with one line that names the flag."""

    checkpoint: Path
    num_stages: int = 1
    split: tuple[int, ...] | None = None  # decoder layers of each stage; None: even
    num_micro_batches: int | None = None  # None: chosen from what is measured, and chosen again as that changes
    max_sequences: int = 32  # in one micro-batch
    max_step_tokens: int = 512  # prompt tokens and sequences of one step together
    kv_bytes: int | None = None  # of each stage; None: a share of what is free
    kv_block_tokens: int = 32
    schedule: Schedule = Schedule.CONTINUOUS
    max_waiting: int = 4096  # requests that wait for a place before the answer is Busy
    dtype: str = "auto"
    device: str = "cpu"
    threads_per_stage: int | None = None  # None: the machine's cores, shared out
    max_restarts: int = 3  # of the whole pipeline, within restart_period_s; 0: the first loss is the end
    restart_period_s: float = 60.0
    join_timeout_s: float = 60.0
    load_timeout_s: float = 600.0
    step_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        _check_range("--stages", self.num_stages, low=1, high=MAX_STAGES)
        if self.num_micro_batches is not None:
            _check_range("--micro-batches", self.num_micro_batches, low=1, high=MAX_MICRO_BATCHES)
        if self.threads_per_stage is not None:
            _check_range("--threads-per-stage", self.threads_per_stage, low=1, high=1024)
        _check_range("--max-sequences", self.max_sequences, low=1, high=MAX_SEQUENCES)
        _check_range("--max-step-tokens", self.max_step_tokens, low=1, high=MAX_CONTEXT_TOKENS)
        if self.dtype not in DTYPES:
            raise Invalid(f"--dtype {self.dtype}: use one of {', '.join(DTYPES)}")
        if self.simulation is None and self.device != "cpu" and not self.device.startswith("cuda"):
            raise Invalid(f"--device {self.device}: use cpu, cuda or sim:layer_ms=10")

    @property
    def simulation(self) -> Simulation | None:
        """Raises Invalid for one that cannot be."""
        return Simulation.parse(self.device) if is_simulation(self.device) else None

    @property
    def threads(self) -> int:
        """Compute threads of one stage, so that the stages of this machine together use its cores once."""
        return self.threads_per_stage or max(1, usable_cores() // self.num_stages)

    def device_of(self, stage: int) -> str:
        """`cuda` gives stage k the card k; anything else is every stage's device."""
        return f"cuda:{stage}" if self.device == "cuda" else self.device


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_range(flag: str, value: int, *, low: int, high: int) -> None:
    if not low <= value <= high:
        raise Invalid(f"{flag} {value}: use a number from {low} to {high}")
