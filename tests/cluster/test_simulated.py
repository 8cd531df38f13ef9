"""Long pipelines of simulated stages: real processes and messages, layers that only take time."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from asyncpipe import Client, Invalid, connect
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from asyncpipe_workers.sim import simulated_tokens
from tests.support import run


def simulated(stages: int, device: str, **options: Any) -> ServiceConfig:
    return ServiceConfig(checkpoint=BUNDLED_MODEL, num_stages=stages, device=device, **options)


async def generate(client: Client, prompts: list[list[int]], count: int) -> list[list[int]]:
    results = await asyncio.gather(*(client.generate(prompt, max_new_tokens=count) for prompt in prompts))
    return [list(result.token_ids) for result in results]


def test_twelve_stages_give_every_prompt_its_own_tokens_and_tell_where_the_time_went() -> None:
    prompts = [[5 + number, 9, number] for number in range(20)]

    async def scenario() -> None:
        config = simulated(12, "sim:layer_ms=2,hidden_size=64", max_sequences=2)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            assert await generate(client, prompts, 12) == [simulated_tokens(prompt, 12) for prompt in prompts]
            status = await client.status()
            assert [stage.layers for stage in status.stages] == [(stage, stage + 1) for stage in range(12)]
            assert 0.0 < status.pipeline.efficiency <= 1.0
            assert status.pipeline.ideal_s < status.pipeline.measured_s
            for stage in status.stages:
                idle = stage.idle.starved_s + stage.idle.send_wait_s
                assert stage.busy_s + idle == pytest.approx(status.pipeline.measured_s, rel=0.05)
                assert stage.busy_share == pytest.approx(stage.busy_s / status.pipeline.measured_s, rel=0.05)

    run(scenario(), timeout_s=60)


def test_a_link_delay_makes_more_micro_batches() -> None:
    async def scenario() -> None:
        config = simulated(2, "sim:layer_ms=4,link_ms=8", max_sequences=1)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            load = asyncio.ensure_future(generate(client, [[5, number] for number in range(30)], 20))
            counts = []
            while not load.done():
                await asyncio.sleep(0.1)
                counts.append((await client.status()).pipeline.num_micro_batches)
            await load
            assert max(counts) >= 6, "a round trip takes 2 x 4 + 3 x 8 ms, and each stage could do a step every 4 ms"

    run(scenario(), timeout_s=60)


def test_the_tokens_of_a_lone_request_go_from_the_last_stage_to_the_first() -> None:
    """A step takes 2 x 1 ms and two links of 20 ms; through the coordinator, three."""

    async def scenario() -> None:
        config = simulated(2, "sim:layer_ms=1,link_ms=20")
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            times_s, token_ids = [], []
            async for piece in client.stream([5, 6, 7], max_new_tokens=30):
                times_s.append(time.monotonic())
                token_ids.append(piece.token_id)
            assert token_ids == simulated_tokens([5, 6, 7], 30)
            gaps_s = sorted(later - earlier for earlier, later in itertools.pairwise(times_s))
            assert 0.035 < gaps_s[len(gaps_s) // 3] < 0.055, gaps_s

    run(scenario(), timeout_s=60)


def test_a_trace_has_a_row_a_stage_and_an_arrow_a_step(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    async def scenario() -> None:
        async with (
            Service.open(simulated(3, "sim:layer_ms=2")) as service,
            connect(await service.listen("memory://clients")) as client,
        ):
            await generate(client, [[1, 2, 3]], 3)  # before the trace: not in it
            async with service.tracing(str(path)):
                await generate(client, [[5, 6], [7, 8]], 8)
            with pytest.raises(Invalid, match="no/such/folder"):
                async with service.tracing("no/such/folder/trace.json"):
                    pass

    run(scenario(), timeout_s=60)
    trace = json.loads(path.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in trace if event["name"] == "process_name"]
    assert names == [f"stage {stage} (layers {stage}-{stage})" for stage in range(3)]
    computed = defaultdict(dict)
    for event in trace:
        if event["ph"] == "X" and event["name"].startswith("micro-batch"):
            computed[(event["args"]["micro_batch"], event["args"]["step"])][event["pid"]] = event
    whole = {step: stages for step, stages in computed.items() if len(stages) == 3}
    assert len(whole) >= 8
    assert len(computed) - len(whole) <= 3, (
        "on their way: at the start that which frees the sequence before, at the end one of two"
    )
    for stages in whole.values():
        assert stages[0]["ts"] < stages[1]["ts"] < stages[2]["ts"], "the clocks are aligned"
    flows = defaultdict(list)
    for event in trace:
        if event.get("cat") == "step":
            flows[event["id"]].append(event["ph"])
    assert all(sorted(flows[f"{micro_batch}.{step}"]) == ["f", "s", "t"] for micro_batch, step in whole)


def test_a_short_prompt_is_at_most_three_steps_later_while_a_long_one_is_computed() -> None:
    """Steps of 512 tokens take 10 ms + 512 x 40 us; alone, the short prompt takes a step of 10 ms on each stage."""
    layer_ms, per_token_us, stages = 10.0, 40.0, 2
    full_step_s = layer_ms / 1e3 + 512 * per_token_us / 1e6

    async def scenario() -> None:
        device = f"sim:layer_ms={layer_ms},prefill_us_per_token={per_token_us}"
        async with (
            Service.open(simulated(stages, device)) as service,
            connect(await service.listen("memory://clients")) as client,
        ):
            alone_s = (await client.generate([5] * 8, max_new_tokens=1)).usage.time_to_first_token_s
            delays_s = []
            for moment in range(5):
                long = asyncio.ensure_future(client.generate([6 + moment] * 2000, max_new_tokens=1))
                await asyncio.sleep(0.01 + 0.015 * moment)
                delays_s.append((await client.generate([5] * 8, max_new_tokens=1)).usage.time_to_first_token_s - alone_s)
                await long
            assert sorted(delays_s)[2] < 3 * full_step_s, f"{[round(delay / full_step_s, 2) for delay in delays_s]} steps"

    run(scenario(), timeout_s=60)


def check_without_torch(pid: int) -> None:
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_no_torch_is_imported_by_simulated_workers() -> None:
    async def scenario() -> None:
        async with Service.open(simulated(1, "sim")) as service, connect(await service.listen("memory://c")) as client:
            check_without_torch((await client.status()).stages[0].pid)

    start_s = time.monotonic()
    run(scenario(), timeout_s=60)
    assert time.monotonic() - start_s < 20


@pytest.mark.parametrize(
    ("device", "words"), [("sim:layer=3", "layer_ms"), ("sim:layer_ms=x", "not a number"), ("sim:context=1", "at least 2")]
)
def test_a_bad_simulation_is_refused(device: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        simulated(1, device)
