"""Worker processes that have joined, and where they come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from asyncpipe.actors import ActorRef
from asyncpipe.errors import AsyncPipeError
from asyncpipe.process import ChildProcess
from asyncpipe.wire.links import LinkKind
from asyncpipe.wire.messages import Join, StageReport


@dataclass(slots=True, eq=False)
class Worker:
    """A process that can be a stage, on this machine or another; `report` is of the stage that it is."""

    join: Join
    ref: ActorRef
    process: ChildProcess | None = None  # when this coordinator has started it
    report: StageReport | None = None
    link: LinkKind = LinkKind.ZMQ  # by which hidden states go to the next stage
    is_doubtful: bool = False  # it has not reached the one that was the next stage

    @property
    def name(self) -> str:
        """For people: "pid 4711", "pid 4711 on box-2"."""
        return f"pid {self.join.pid}" if self.process is not None else f"pid {self.join.pid} on {self.join.host}"


class OnProgress(Protocol):
    def __call__(self, what: str, *, steps: int = 1) -> None:
        """`what` has happened, which is `steps` of the start's."""
        ...


class OnLoss(Protocol):
    def __call__(self, worker: Worker, error: AsyncPipeError, /) -> None:
        """`worker`, which was given to a stage, has died."""
        ...


def say_nothing(what: str, *, steps: int = 1) -> None:
    """For starts that nobody watches."""


class WorkerSource(Protocol):
    """Gives workers to stages. Whoever has joined and is nobody's is a spare."""

    async def gather(self, stages: Collection[int]) -> Mapping[int, Worker]:
        """One for each stage. Raises Timeout when not enough came in time, StageLost or Invalid for one that cannot start."""
        ...

    def discard(self, worker: Worker, error: AsyncPipeError) -> None:
        """It is of no more use as it is: it ends, or joins anew."""
        ...

    def on_join(self, join: Join, sender: ActorRef) -> None:
        """Raises Invalid for one that nobody waits for."""
        ...

    def on_down(self, ref: ActorRef, error: AsyncPipeError) -> None:
        """A process that had joined is gone."""
        ...

    @property
    def num_spares(self) -> int: ...

    async def stop(self) -> None:
        """Every process that was started here is reaped."""
        ...
