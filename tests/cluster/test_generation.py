"""The whole product, with real worker processes: every pipeline shape gives Hugging Face's tokens."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import pytest

from asyncpipe import Client, Invalid, connect
from asyncpipe.cores import find_cores
from asyncpipe.policy import Policy
from asyncpipe.wire.messages import FinishReason
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.checkpoints import distinct_prompts, make_opt, reference_generate, save_tokenizer
from tests.families import make_family, reference_tokens
from tests.support import run

NUM_TOKENS = 8
GRID = [(stages, micro_batches) for stages in (1, 2, 3, 4) for micro_batches in range(1, 2 * stages + 2)]


@asynccontextmanager
async def serving(path: Path, **options: object) -> AsyncIterator[Client]:
    config = ServiceConfig(checkpoint=path, threads_per_stage=1, **options)  # type: ignore[arg-type]
    async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
        yield client


async def generate_all(client: Client, prompts: list[list[int]]) -> list[list[int]]:
    results = await asyncio.gather(
        *(client.generate(prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True, timeout_s=30) for prompt in prompts)
    )
    return [list(result.token_ids) for result in results]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("prenorm"))


@cache
def reference(path: Path, count: int) -> list[list[int]]:
    return reference_generate(path, distinct_prompts(count), max_new_tokens=NUM_TOKENS)


@pytest.mark.parametrize(("stages", "micro_batches"), GRID)
def test_tokens_equal_hugging_face_for_every_number_of_stages_and_micro_batches(
    checkpoint: Path, stages: int, micro_batches: int
) -> None:
    prompts = distinct_prompts(11)

    async def scenario() -> list[list[int]]:
        async with serving(checkpoint, num_stages=stages, num_micro_batches=micro_batches, max_sequences=4) as client:
            return await generate_all(client, prompts)

    assert run(scenario(), timeout_s=60) == reference(checkpoint, 11)


@pytest.mark.skipif(find_cores().count < 2, reason="two stages need two cores for that")
def test_pinned_stages_have_cores_of_their_own(checkpoint: Path) -> None:
    async def scenario() -> list[set[int]]:
        async with serving(checkpoint, num_stages=2, pin="cores") as client:
            await generate_all(client, distinct_prompts(2))
            return [os.sched_getaffinity(stage.pid) for stage in (await client.status()).stages]

    first, second = run(scenario(), timeout_s=60)
    assert first and second and not first & second


@pytest.mark.parametrize(
    ("shape", "split"), [("350m", (1, 2, 1)), ("galactica", (3, 1)), ("untied", (1, 3)), ("opt-iml", (1, 1, 2))]
)
def test_every_shape_of_opt_runs_on_an_uneven_split(shape: str, split: tuple[int, ...], tmp_path: Path) -> None:
    path = make_opt(tmp_path, shape=shape)
    prompts = distinct_prompts(6)

    async def scenario() -> list[list[int]]:
        async with serving(path, num_stages=len(split), split=split) as client:
            return await generate_all(client, prompts)

    assert run(scenario(), timeout_s=60) == reference(path, 6)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_stream_has_one_piece_a_token_and_its_texts_add_up(checkpoint: Path, num_stages: int) -> None:
    async def scenario() -> None:
        async with serving(checkpoint, num_stages=num_stages) as client:
            stream = client.stream("naïve café", max_new_tokens=12, ignore_eos=True)
            pieces = [piece async for piece in stream]
            assert [piece.index for piece in pieces] == list(range(12))
            whole = await client.generate("naïve café", max_new_tokens=12, ignore_eos=True)
            assert tuple(piece.token_id for piece in pieces) == whole.token_ids == stream.result.token_ids
            assert "".join(piece.text for piece in pieces) == whole.text == stream.result.text
            assert whole.finish_reason is FinishReason.LENGTH
            assert whole.usage.prompt_tokens == len(whole.prompt_token_ids)

    run(scenario(), timeout_s=60)


def test_stop_strings_seeds_cancel_and_status(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with serving(checkpoint, num_stages=2) as client:
            await check_stop_string(client)
            await check_seed(client)
            await check_cancel(client)
            await check_status(client)
            await check_bad_requests(client)

    run(scenario(), timeout_s=60)


def test_one_stage_that_takes_steps_at_once_ends_where_others_do(checkpoint: Path) -> None:
    """Whatever was computed after an end."""

    async def scenario() -> None:
        async with serving(checkpoint, num_stages=1) as client:
            pieces = [piece async for piece in client.stream("to be", max_new_tokens=40, ignore_eos=True)]
            texts = [piece.text for piece in pieces]
            whole = "".join(texts)
            for start in range(3, 30, 9):
                stop = whole[start : start + 3]
                count = next(n for n in range(1, 41) if stop in "".join(texts[:n]))
                stopped = await client.generate("to be", max_new_tokens=40, ignore_eos=True, stop=stop)
                assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], FinishReason.STOP)
                assert stopped.usage.completion_tokens == len(stopped.token_ids) == count
            ends = pieces[20].token_id
            ended = await client.generate("to be", max_new_tokens=40, stop_token_ids=[ends])
            token_ids = [piece.token_id for piece in pieces]
            assert list(ended.token_ids) == token_ids[: token_ids.index(ends) + 1]

    run(scenario(), timeout_s=60)


async def check_stop_string(client: Client) -> None:
    whole = await client.generate("to be", max_new_tokens=20, ignore_eos=True)
    stop = whole.text[4:6]
    stopped = await client.generate("to be", max_new_tokens=20, ignore_eos=True, stop=stop)
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP


async def check_seed(client: Client) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "ignore_eos": True}
    first, again, other = [
        (await client.generate("x", seed=seed, **options)).token_ids  # type: ignore[arg-type]
        for seed in (7, 7, 8)
    ]
    assert first == again
    assert first != other


async def check_cancel(client: Client) -> None:
    stream = client.stream("a", max_new_tokens=150, ignore_eos=True)
    pieces = []
    async for piece in stream:
        pieces.append(piece)
        if len(pieces) == 3:
            await client.cancel(stream.request_id)
    assert stream.result.finish_reason is FinishReason.CANCELLED
    assert 3 <= len(pieces) < 150


async def check_status(client: Client) -> None:
    status = await client.status()
    assert [stage.layers for stage in status.stages] == [(0, 2), (2, 4)]
    assert all(stage.steps > 0 and stage.busy_s > 0 and stage.num_params > 0 for stage in status.stages)
    assert status.requests_running == 0


async def check_bad_requests(client: Client) -> None:
    with pytest.raises(Invalid, match="prompt is empty"):
        await client.generate("")
    with pytest.raises(Invalid, match="at most 159"):
        await client.generate([5] * 160)
    with pytest.raises(Invalid, match="outside the model's vocabulary"):
        await client.generate([5, 320])
    with pytest.raises(Invalid, match="temperature"):
        await client.generate("a", temperature=-1.0)
    with pytest.raises(Invalid, match="unknown parameter 'temprature'"):
        await client.generate("a", temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families_run_on_stages_of_their_own(family: str, tmp_path: Path) -> None:
    path, prompts = make_family(tmp_path, family), distinct_prompts(5, longest=60)
    save_tokenizer(path)

    async def scenario() -> list[list[int]]:
        async with serving(path, num_stages=2, device_memory=8 << 20, policy=Policy(gpu_batch_size=4)) as client:
            return await generate_all(client, prompts)

    assert run(scenario(), timeout_s=60) == reference_tokens(path, prompts, max_new_tokens=NUM_TOKENS)
