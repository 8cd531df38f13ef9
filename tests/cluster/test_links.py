"""Hidden states over Gloo beside the messages: the same tokens, also when a stage is lost, and a way out where it cannot be."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncpipe import Client, Invalid, connect
from asyncpipe.wire.links import LinkKind
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.checkpoints import distinct_prompts, make_opt, reference_generate
from tests.support import run

NUM_TOKENS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"))


def three_stages(checkpoint: Path, **options: Any) -> ServiceConfig:
    return ServiceConfig(checkpoint=checkpoint, num_stages=3, threads_per_stage=1, **options)


async def generate_all(
    client: Client, prompts: list[list[int]], *, at_token: Callable[[int], object] = lambda _: None
) -> list[list[int]]:
    """`at_token` hears the indexes of the first prompt's tokens."""

    async def one(number: int) -> list[int]:
        token_ids = []
        async for piece in client.stream(prompts[number], max_new_tokens=NUM_TOKENS, ignore_eos=True):
            token_ids.append(piece.token_id)
            if number == 0:
                at_token(piece.index)
        return token_ids

    return list(await asyncio.gather(*map(one, range(len(prompts)))))


@pytest.mark.parametrize("dies", [False, True], ids=["all live", "one dies"])
def test_tokens_over_gloo_equal_hugging_face(checkpoint: Path, dies: bool) -> None:
    """Prompts are longer than a step takes, so that many transfers are under way at once."""
    prompts = distinct_prompts(9)

    async def scenario() -> list[list[int]]:
        config = three_stages(checkpoint, link="gloo", max_step_tokens=32)
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            stages = (await client.status()).stages
            assert [stage.link for stage in stages] == [LinkKind.GLOO, LinkKind.GLOO, LinkKind.ZMQ]

            def strike(index: int) -> None:
                if dies and index == 10:
                    os.kill(stages[1].pid, signal.SIGKILL)

            tokens = await generate_all(client, prompts, at_token=strike)
            after = await client.status()
            assert (after.restarts, after.requests_failed) == (int(dies), 0)
            assert [stage.link for stage in after.stages] == [LinkKind.GLOO, LinkKind.GLOO, LinkKind.ZMQ], "made anew"
            return tokens

    assert run(scenario(), timeout_s=90) == reference_generate(checkpoint, prompts, max_new_tokens=NUM_TOKENS)


def test_what_cannot_be_had_falls_back_to_messages(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = distinct_prompts(2)

    async def scenario() -> list[list[int]]:
        config = three_stages(checkpoint, link="nccl")
        async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
            assert {stage.link for stage in (await client.status()).stages} == {LinkKind.ZMQ}
            return await generate_all(client, prompts)

    assert run(scenario(), timeout_s=60) == reference_generate(checkpoint, prompts, max_new_tokens=NUM_TOKENS)
    assert "stage 0 travel in its messages: no nccl link from cpu to cpu" in caplog.text


def test_a_link_that_there_is_not_is_a_mistake(checkpoint: Path) -> None:
    with pytest.raises(Invalid, match=r"--link carrier-pigeon: use one of auto, zmq, gloo, nccl"):
        three_stages(checkpoint, link="carrier-pigeon")
