"""What a pool of workers says of them."""

from __future__ import annotations

from typing import Any, cast
from unittest.mock import Mock

import pytest

from asyncpipe.wire.messages import Join
from asyncpipe_coordinator.core.partition import split_layers
from asyncpipe_coordinator.shell.pool import WorkerPool
from asyncpipe_coordinator.shell.workers import Worker


def pool_of(*joins: Join) -> WorkerPool:
    nobody = cast(Any, Mock())
    pool = WorkerPool(
        config=nobody,
        layers=split_layers(12, len(joins)),
        model=nobody,
        dtype="auto",
        max_sequences=8,
        source=nobody,
        on_progress=nobody,
    )
    pool.workers = {stage: Worker(join, ref=nobody) for stage, join in enumerate(joins)}
    return pool


def joined(device: str, *, machine: str = "here", card: str = "") -> Join:
    return Join(pid=1, host="box", machine=machine, device=device, card=card, num_cores=6, address="tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("joins", "expected"),
    [
        ([joined("cpu"), joined("cpu")], True),
        ([joined("cpu"), joined("cpu", machine="there"), joined("cpu")], True),
        ([joined("cpu"), joined("cpu", machine="there")], False),
        ([joined("cuda:0", card="GPU-1"), joined("cuda:0", card="GPU-1")], True),
        ([joined("cuda:0", card="GPU-1"), joined("cuda:1", card="GPU-2")], False),
        ([joined("cpu"), joined("cuda:0", card="GPU-1")], False),
        ([joined("sim:layer_ms=1"), joined("sim:layer_ms=1")], False),
        ([joined("cpu")], False),
    ],
)
def test_stages_share_memory_on_the_processors_of_a_machine_or_on_a_card(joins: list[Join], expected: bool) -> None:
    assert pool_of(*joins).shares_memory is expected


@pytest.mark.parametrize(
    ("joins", "expected"),
    [
        ([joined("cpu"), joined("cpu")], 4),
        ([joined("cpu"), joined("cpu", machine="there"), joined("cpu")], 4),
        ([joined("cpu"), joined("cuda:0"), joined("cpu"), joined("cpu"), joined("cpu")], 6),
        ([joined("cpu"), joined("cuda:0")], 2),
        ([joined("cuda:0"), joined("cpu")], 0),
    ],
)
def test_the_threads_of_a_machine_are_those_of_its_stages_on_cores_that_the_first_may_use(
    joins: list[Join], expected: int
) -> None:
    pool = pool_of(*joins)
    assert pool._machine_threads(pool.workers[0], num_threads=2) == expected
