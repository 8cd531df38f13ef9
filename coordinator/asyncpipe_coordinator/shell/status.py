"""Answers `GetStatus` from an actor of its own, so that asking the stages never delays the token loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from asyncpipe.actors import Actor
from asyncpipe.policy import Policy
from asyncpipe.wire.messages import (
    GetStatus,
    IdleTimes,
    KVStatus,
    PipelineStatus,
    StageCounters,
    StageStatus,
    Status,
    TierReport,
    TransferReport,
)
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.shell.coordinator import CoordinatorActor
from asyncpipe_coordinator.shell.pool import WorkerPool
from asyncpipe_coordinator.shell.workers import Worker

STATUS_ACTOR = "status"


class StatusActor(Actor):
    """Reads the coordinator's state on its own loop; asks each stage for its counters."""

    receives: ClassVar[Any] = GetStatus

    def __init__(self, coordinator: CoordinatorActor, *, machine: Machine, model_name: str) -> None:
        self._coordinator = coordinator
        self._machine = machine
        self._model_name = model_name
        self._started_at_s = time.monotonic()

    async def handle(self, message: GetStatus) -> Status:
        pool = self._coordinator.pool
        counters = await pool.counters() if pool is not None else {}
        statistics = self._machine.statistics()
        return Status(
            model=self._model_name,
            state="running" if self._coordinator.is_up else "starting",
            uptime_s=time.monotonic() - self._started_at_s,
            restarts=self._coordinator.num_restarts,
            spares=pool.source.num_spares if pool is not None else 0,
            requests_waiting=statistics.waiting,
            requests_running=statistics.running,
            requests_finished=statistics.finished,
            requests_failed=statistics.failed,
            prompt_tokens=statistics.prompt_tokens,
            generated_tokens=statistics.generated_tokens,
            max_context_len=self._machine.max_context_len,
            pipeline=self._pipeline(statistics.num_micro_batches),
            kv=KVStatus(
                num_blocks=statistics.num_blocks,
                used_blocks=statistics.used_blocks,
                block_tokens=self._machine.limits.kv_block_tokens,
                preemptions=statistics.preemptions,
            ),
            stages=self._stages(pool, counters),
        )

    def _pipeline(self, num_micro_batches: int) -> PipelineStatus:
        meter, tuner = self._machine.meter, self._machine.tuner
        return PipelineStatus(
            num_micro_batches=num_micro_batches,
            steps=meter.num_steps,
            ideal_s=meter.ideal_s,
            measured_s=meter.measured_s,
            efficiency=meter.efficiency,
            bubble=meter.bubble,
            round_trip_s=tuner.round_trip_s,
            overhead_s=tuner.overhead_s,
        )

    def _stages(self, pool: WorkerPool | None, counters: Mapping[int, StageCounters]) -> tuple[StageStatus, ...]:
        if pool is None:
            return ()
        active_s = self._machine.meter.measured_s
        return tuple(
            _status(stage, worker, counters.get(stage), active_s, pool.config.policy_of(stage))
            for stage, worker in sorted(pool.workers.items())
        )


def _status(stage: int, worker: Worker, counters: StageCounters | None, active_s: float, policy: Policy) -> StageStatus:
    """`active_s` is for how long the pipeline has had work."""
    join, report = worker.join, worker.report
    busy_s, send_wait_s, span_s = (counters.busy_s, counters.send_wait_s, counters.span_s) if counters else (0.0, 0.0, 0.0)
    return StageStatus(
        stage=stage,
        pid=join.pid,
        device=join.device,
        host=join.host,
        layers=report.layers if report else (0, 0),
        num_params=report.num_params if report else 0,
        param_bytes=report.param_bytes if report else 0,
        steps=counters.steps if counters else 0,
        busy_s=busy_s,
        busy_share=min(busy_s / active_s, 1.0) if active_s else 0.0,
        idle=IdleTimes(
            starved_s=max(active_s - busy_s - send_wait_s, 0.0), send_wait_s=send_wait_s, no_work_s=max(span_s - active_s, 0.0)
        ),
        link=worker.link,
        kv_blocks=report.kv_blocks if report else 0,
        policy=policy,
        tiers=report.tiers if report else TierReport(),
        transfers=counters.transfers if counters else TransferReport(),
        peak_host_bytes=counters.peak_host_bytes if counters else 0,
        peak_device_bytes=counters.peak_device_bytes if counters else 0,
    )
