"""Answers `GetStatus` from an actor of its own, so that asking the stages never delays the token loop."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from asyncpipe.actors import Actor
from asyncpipe.wire.messages import GetStatus, Status
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.shell.coordinator import CoordinatorActor

STATUS_ACTOR = "status"


class StatusActor(Actor):
    """Reads the coordinator's state on its own loop; asks each stage for its counters."""

    receives: ClassVar[Any] = GetStatus

    def __init__(
        self,
        coordinator: CoordinatorActor,
        *,
        machine: Machine,
        model: ModelInfo,
        model_name: str,
        num_micro_batches: int,
    ) -> None:
        self._coordinator = coordinator
        self._machine = machine
        self._model = model
        self._model_name = model_name
        self._num_micro_batches = num_micro_batches
        self._started_at_s = time.monotonic()

    async def handle(self, message: GetStatus) -> Status:
        pool = self._coordinator.pool
        stages = await pool.statuses() if pool is not None else ()
        statistics = self._machine.statistics()
        return Status(
            model=self._model_name,
            state="running" if self._coordinator.is_up else "starting",
            uptime_s=time.monotonic() - self._started_at_s,
            num_micro_batches=self._num_micro_batches,
            requests_waiting=statistics.waiting,
            requests_running=statistics.running,
            requests_finished=statistics.finished,
            prompt_tokens=statistics.prompt_tokens,
            generated_tokens=statistics.generated_tokens,
            max_context_len=self._model.max_context_len,
            stages=stages,
        )
