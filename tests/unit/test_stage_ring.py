"""Two stage actors and what is between them: steps that go round, and a ring that breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
import pytest

from asyncpipe.actors import Actor, ActorRef, ActorSystem
from asyncpipe.errors import ErrorCode
from asyncpipe.ids import new_node_id
from asyncpipe.simulation import Simulation
from asyncpipe.wire.messages import Chunk, ConnectNext, Delta, LoadStage, Opened, Ready, StageFailed, Step, Tokens
from asyncpipe_workers import stage as stage_module
from asyncpipe_workers.hidden_links import StageSeat
from asyncpipe_workers.sim import SimulatedStage, simulated_tokens
from asyncpipe_workers.stage import STAGE_ACTOR, StageActor
from tests.support import run, until

PROMPT = (7, 8, 9)
SEAT = StageSeat(machine="m", device="cpu", card="", ip="127.0.0.1")


class Coordinator(Actor):
    """Keeps what it is told."""

    receives: ClassVar[Any] = Tokens | StageFailed

    def __init__(self) -> None:
        self.tokens: list[Tokens] = []
        self.failures: list[StageFailed] = []

    async def handle(self, message: Tokens | StageFailed) -> None:
        (self.tokens if isinstance(message, Tokens) else self.failures).append(message)  # type: ignore[arg-type]


class Threads(SimulatedStage):
    """Keeps with how many it is to compute each step."""

    def __init__(self, simulation: Simulation, plan: LoadStage) -> None:
        super().__init__(simulation, plan)
        self.used: list[int] = []

    def use_threads(self, num_threads: int) -> None:
        self.used.append(num_threads)


@dataclass
class Pipeline:
    """The stages as the coordinator sees them, and their systems."""

    coordinator: Coordinator
    stages: list[ActorRef] = field(default_factory=list)
    computes: list[Threads] = field(default_factory=list)
    systems: list[ActorSystem] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def load(self, plan: LoadStage) -> Threads:
        self.computes.append(Threads(Simulation(layer_ms=1.0), plan))
        return self.computes[-1]

    async def connect(self, stage: int, address: str) -> Ready:
        return await self.stages[stage].ask(ConnectNext(epoch=1, address=address), timeout=10.0)

    async def begin(self, *, num_steps: int, is_alone: bool = False, is_gathered: bool = False) -> None:
        """A prompt's step, and when its token is there the one that several begin with, which may be alone or gathered."""
        opened = Delta(opened=(Opened(0, PROMPT, len(PROMPT)),), chunks=(Chunk(0, len(PROMPT)),))
        await self.stages[0].tell(Step(epoch=1, micro_batch=0, step=0, delta=opened))
        await until(lambda: len(self.coordinator.tokens) == 1)
        going_on = Delta(token_ids=self.coordinator.tokens[0].token_ids, num_steps=num_steps)
        begins = Step(epoch=1, micro_batch=0, step=1, delta=going_on, is_alone=is_alone, is_gathered=is_gathered)
        await self.stages[0].tell(begins)


def plan(stage: int, num_stages: int) -> LoadStage:
    return LoadStage(
        epoch=1,
        stage=stage,
        num_stages=num_stages,
        first_layer=stage,
        last_layer=stage + 1,
        checkpoint="none",
        config_json="{}",
        dtype="float32",
        max_context_len=4096,
        max_sequences=8,
        kv_block_tokens=16,
        num_threads=2,
        machine_threads=4,
    )


@asynccontextmanager
async def two_stages() -> AsyncIterator[Pipeline]:
    """Loaded; stage 0 reaches stage 1."""
    async with AsyncExitStack() as stack:
        coordinator = Coordinator()
        system = await stack.enter_async_context(ActorSystem("coordinator", role="coordinator"))
        system.spawn(lambda: coordinator, name="coordinator")
        pipeline = Pipeline(coordinator)
        home = await system.listen(f"memory://{new_node_id()}")
        for _ in range(2):
            worker = await stack.enter_async_context(ActorSystem("worker", role="worker"))
            actor = StageActor(loader=pipeline.load, seat=SEAT)
            stage = worker.spawn(lambda actor=actor: actor, name=STAGE_ACTOR)
            actor.serve((await worker.connect(home, actor="coordinator")).as_seen_by(stage))
            pipeline.systems.append(worker)
            pipeline.addresses.append(await worker.listen(f"memory://{worker.node}"))
            pipeline.stages.append(await system.connect(pipeline.addresses[-1], actor=STAGE_ACTOR))
        for number, stage in enumerate(pipeline.stages):
            await stage.ask(plan(number, 2), timeout=5.0)
        assert await pipeline.connect(0, pipeline.addresses[1]) == Ready(stage=0)
        yield pipeline


def test_the_steps_of_several_at_once_go_round_and_their_tokens_come_one_by_one() -> None:
    async def scenario() -> None:
        async with two_stages() as pipeline:
            assert await pipeline.connect(1, pipeline.addresses[0]) == Ready(stage=1)
            await pipeline.begin(num_steps=6)
            tokens = pipeline.coordinator.tokens
            await until(lambda: len(tokens) == 7)
            assert [token_id for answer in tokens for token_id in answer.token_ids] == simulated_tokens(list(PROMPT), 7)
            assert [answer.step for answer in tokens] == list(range(7))
            assert [len(answer.timings) for answer in tokens] == [2] * 7
            await asyncio.sleep(0.02)
            assert len(tokens) == 7, "after the last of them the coordinator is asked"
            assert not pipeline.coordinator.failures

    run(scenario(), timeout_s=30)


def test_the_tokens_of_gathered_steps_come_together_with_the_sums_of_their_timings() -> None:
    async def scenario() -> None:
        async with two_stages() as pipeline:
            await pipeline.connect(1, pipeline.addresses[0])
            await pipeline.begin(num_steps=6, is_gathered=True)
            tokens = pipeline.coordinator.tokens
            await until(lambda: len(tokens) == 2)
            first, gathered = tokens
            assert [*first.token_ids, *gathered.token_ids] == simulated_tokens(list(PROMPT), 7)
            assert gathered.step == 1
            assert all(timing.compute_us > 5900 for timing in gathered.timings), "a millisecond for each step"
            going_on = Delta(token_ids=gathered.token_ids[-1:], num_steps=2)
            await pipeline.stages[0].tell(Step(epoch=1, micro_batch=0, step=7, delta=going_on, is_gathered=True))
            await until(lambda: len(tokens) == 3)
            assert (tokens[2].step, len(tokens[2].token_ids)) == (7, 2)
            assert not pipeline.coordinator.failures

    run(scenario(), timeout_s=30)


def test_what_was_gathered_in_an_epoch_is_forgotten_in_the_next() -> None:
    async def scenario() -> None:
        async with two_stages() as pipeline:
            await pipeline.connect(1, pipeline.addresses[0])
            await pipeline.begin(num_steps=64, is_gathered=True)
            await until(lambda: len(pipeline.computes[1].used) > 5)
            for number, stage in enumerate(pipeline.stages):
                await stage.ask(msgspec.structs.replace(plan(number, 2), epoch=2), timeout=5.0)
            for number, address in enumerate(reversed(pipeline.addresses)):
                await pipeline.stages[number].ask(ConnectNext(epoch=2, address=address), timeout=5.0)
            opened = Delta(opened=(Opened(0, PROMPT, len(PROMPT)),), chunks=(Chunk(0, len(PROMPT)),))
            await pipeline.stages[0].tell(Step(epoch=2, micro_batch=0, step=0, delta=opened))
            tokens = pipeline.coordinator.tokens
            await until(lambda: len(tokens) == 2)
            going_on = Delta(token_ids=tokens[1].token_ids, num_steps=2)
            await pipeline.stages[0].tell(Step(epoch=2, micro_batch=0, step=1, delta=going_on, is_gathered=True))
            await until(lambda: len(tokens) == 3)
            assert [*tokens[1].token_ids, *tokens[2].token_ids] == simulated_tokens(list(PROMPT), 3)
            assert (tokens[2].epoch, tokens[2].step) == (2, 1)

    run(scenario(), timeout_s=30)


def test_steps_that_are_alone_have_the_threads_of_the_whole_machine() -> None:
    async def scenario() -> None:
        async with two_stages() as pipeline:
            await pipeline.connect(1, pipeline.addresses[0])
            await pipeline.begin(num_steps=3, is_alone=True)
            await until(lambda: len(pipeline.coordinator.tokens) == 4)
            assert [compute.used for compute in pipeline.computes] == [[2, 4, 4, 4]] * 2

    run(scenario(), timeout_s=30)


def test_where_the_last_stage_cannot_reach_the_first_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "CONNECT_TIMEOUT_S", 0.2)

    async def scenario() -> None:
        async with two_stages() as pipeline:
            ready = await pipeline.connect(1, "memory://nobody")
            assert "nobody" in ready.obstacle
            await pipeline.begin(num_steps=1)
            await until(lambda: len(pipeline.coordinator.tokens) == 2)
            assert not pipeline.coordinator.failures

    run(scenario(), timeout_s=30)


def test_a_last_stage_that_loses_the_first_says_whom() -> None:
    async def scenario() -> None:
        async with two_stages() as pipeline:
            await pipeline.connect(1, pipeline.addresses[0])
            await pipeline.begin(num_steps=64)
            await until(lambda: len(pipeline.coordinator.tokens) > 5)
            await pipeline.systems[0].stop(pipeline.systems[0].cell(STAGE_ACTOR).ref)
            await until(lambda: bool(pipeline.coordinator.failures))
            (failure,) = pipeline.coordinator.failures
            assert (failure.stage, failure.error.code) == (0, ErrorCode.BROKEN)
            assert "stage 1 cannot reach it" in failure.error.message

    run(scenario(), timeout_s=30)
