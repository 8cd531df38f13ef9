"""What a stage drives: a model's layers, or anything that takes steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from asyncpipe.wire.messages import LoadStage, TierReport
from asyncpipe_workers.memory.transfers import TransferLog
from asyncpipe_workers.output import ArrivedStep, StageOutput


class StageCompute(Protocol):
    """Called on the stage's compute thread."""

    @property
    def num_params(self) -> int: ...

    @property
    def param_bytes(self) -> int: ...

    @property
    def kv_blocks(self) -> int: ...

    @property
    def kv_block_bytes(self) -> int: ...

    @property
    def link_s(self) -> float:
        """Simulated delay of a message on its way in, and of the last stage's on its way out; 0.0 for real stages."""
        ...

    posts_hidden: bool
    """Whether hidden states are to be given as they are, to be posted, and not as part of a message."""

    @property
    def tiers(self) -> TierReport:
        """Where its bytes live."""
        ...

    @property
    def transfers(self) -> TransferLog | None:
        """What moves between memory tiers, if anything can."""
        ...

    def use_threads(self, num_threads: int) -> None:
        """For what is computed from now on; 0: as many as it likes."""
        ...

    def choose(self, arrived: Callable[[], Sequence[ArrivedStep]]) -> int:
        """How many of the steps that have arrived by now are to be computed together: the first so many, at least one."""
        ...

    def compute(self, steps: Sequence[ArrivedStep]) -> Iterable[StageOutput]:
        """One output for each step, in order, each as soon as it is there."""
        ...

    def forget_all(self) -> None:
        """Every sequence with its keys and values, and every micro-batch: what comes next begins anew."""
        ...

    def close(self) -> None: ...


Loader = Callable[[LoadStage], StageCompute]
