"""Who of the workers that join becomes which stage."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from asyncpipe.actors import ActorRef
from asyncpipe.errors import AsyncPipeError, Broken, Timeout
from asyncpipe.ids import ActorName, NodeId
from asyncpipe.wire.messages import Join
from asyncpipe_coordinator.shell.external_workers import ExternalWorkers, describe, match, reachable
from asyncpipe_coordinator.shell.workers import Worker, say_nothing
from tests.support import run


class NoRoute:
    def __init__(self, node: str) -> None:
        self.node = NodeId(node)


def join(pid: int, *, rank: int | None = None, stage: int | None = None) -> Join:
    return Join(rank=rank, stage=stage, pid=pid, host="box", device="cpu", address="tcp://10.0.0.1:1")


def ref(pid: int) -> ActorRef:
    return ActorRef(ActorName("stage"), NoRoute(f"node-{pid}"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stages", "joins", "expected"),
    [
        ((0, 1), [join(1), join(2)], {0: 1, 1: 2}),
        ((0, 1), [join(1, rank=1), join(2, rank=0)], {0: 2, 1: 1}),
        ((0, 1), [join(1, rank=0), join(2, rank=0), join(3, rank=1)], {0: 1, 1: 3}),
        ((0, 1), [join(1, rank=7), join(2, rank=0)], {0: 2, 1: 1}),
        ((1,), [join(1), join(2, stage=1), join(3, rank=1)], {1: 2}),
        ((0, 1, 2), [join(1, stage=2, rank=0), join(2, rank=0), join(3)], {2: 1, 0: 2, 1: 3}),
    ],
    ids=["in order", "by rank", "one rank twice", "a rank beyond", "who holds it comes first", "held before rank"],
)
def test_workers_get_the_stages_that_they_ask_for(stages: Collection[int], joins: list[Join], expected: dict[int, int]) -> None:
    chosen = match(stages, [Worker(one, ref(one.pid)) for one in joins])
    assert {stage: worker.join.pid for stage, worker in chosen.items()} == expected


def test_stages_are_given_out_when_there_are_enough_workers_and_the_rest_are_spares() -> None:
    async def scenario() -> None:
        dropped: list[NodeId] = []

        def drop(node: NodeId, _: AsyncPipeError) -> None:
            dropped.append(node)

        source = ExternalWorkers(join_timeout_s=5.0, drop=drop, on_progress=say_nothing)
        waiting = asyncio.ensure_future(source.gather([0, 1]))
        source.on_join(join(1, rank=1), ref(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        for pid in (2, 3):
            source.on_join(join(pid), ref(pid))
        assert {stage: worker.join.pid for stage, worker in (await waiting).items()} == {0: 2, 1: 1}
        assert source.num_spares == 1
        source.on_down(ref(3), Broken("gone"))
        assert source.num_spares == 0
        source.discard((await waiting)[0], Broken("it fails"))
        assert dropped == ["node-2"]
        with pytest.raises(Timeout, match=r"0 of 1 workers .* within 0.01 s"):
            await ExternalWorkers(join_timeout_s=0.01, drop=drop, on_progress=say_nothing).gather([0])

    run(scenario())


def test_who_was_discarded_comes_after_others_when_it_joins_again() -> None:
    """It holds the stage's weights still, and was discarded all the same."""

    async def scenario() -> None:
        source = ExternalWorkers(join_timeout_s=5.0, drop=lambda node, error: None, on_progress=say_nothing)
        source.on_join(join(1), ref(1))
        chosen = await source.gather([0])
        source.discard(chosen[0], Broken("nobody reaches it"))
        source.on_join(join(2), ref(2))
        source.on_join(join(1, rank=0, stage=0), ref(1))
        assert (await source.gather([0]))[0].join.pid == 2

    run(scenario())


def test_a_worker_is_described_by_what_people_look_for() -> None:
    one = Join(pid=7, host="box-2", device="cuda:0", device_name="H100", memory_bytes=80 << 30, address="tcp://10.0.0.1:1")
    assert describe(one) == "pid 7 on box-2, cuda:0 (H100), 80.0 GiB"


def test_a_wildcard_is_no_address_to_connect_to() -> None:
    assert "0.0.0.0" not in reachable("tcp://0.0.0.0:5550")  # noqa: S104 - an address to look at
    assert reachable("tcp://10.0.0.1:5550") == "tcp://10.0.0.1:5550"
