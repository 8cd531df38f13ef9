"""Continuous batching with real workers: whatever the scheduler does, every prompt gets Hugging Face's tokens."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncpipe import Client, Generation, connect
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.limits import Schedule
from asyncpipe_coordinator.service import Service
from tests.checkpoints import distinct_prompts, make_opt, reference_generate
from tests.cluster.test_generation import serving
from tests.support import run

COUNT = 24
NUM_TOKENS = 24
BLOCK_BYTES = 2 * 2 * 4 * 4096  # keys and values, two layers, four heads, a page each


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return reference_generate(checkpoint, distinct_prompts(COUNT), max_new_tokens=NUM_TOKENS)


async def generate_all(client: Client, **options: Any) -> list[Generation]:
    prompts = distinct_prompts(COUNT)
    options = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "timeout_s": 60} | options
    return list(await asyncio.gather(*(client.generate(prompt, **options) for prompt in prompts)))


@pytest.mark.parametrize(
    "options",
    [
        {"max_step_tokens": 16},
        {"max_step_tokens": 16, "num_micro_batches": 5},
        {"kv_bytes": 10 * BLOCK_BYTES, "kv_block_tokens": 16, "max_step_tokens": 32},
        {"schedule": Schedule.STATIC, "max_sequences": 5},
        {"schedule": Schedule.BARRIER},
    ],
    ids=["small steps", "many micro-batches", "too little KV memory", "static", "barrier"],
)
def test_tokens_equal_hugging_face(checkpoint: Path, expected: list[list[int]], options: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with serving(checkpoint, num_stages=2, **({"max_sequences": 4} | options)) as client:
            results = await generate_all(client)
            assert [list(result.token_ids) for result in results] == expected
            status = await client.status()
            assert status.kv.used_blocks == 0
            if "kv_bytes" in options:
                assert status.kv.preemptions > 0, "the memory was meant to be too little"
                assert status.kv.num_blocks == 10

    run(scenario(), timeout_s=120)


def test_neighbours_that_come_and_are_cancelled_change_no_token(checkpoint: Path, expected: list[list[int]]) -> None:
    rng = random.Random(4)

    async def disturb(client: Client, number: int) -> None:
        """Join at some moment, leave at another."""
        await asyncio.sleep(rng.random() * 0.5)
        stream = client.stream([5 + number] * rng.randrange(1, 120), max_new_tokens=40, ignore_eos=True, timeout_s=60)
        wanted = rng.randrange(0, 30)
        async for piece in stream:
            if piece.index >= wanted:
                await stream.aclose()
                return

    async def scenario() -> None:
        options: dict[str, Any] = {"kv_bytes": 30 * BLOCK_BYTES, "kv_block_tokens": 16, "max_step_tokens": 32}
        async with serving(checkpoint, num_stages=2, max_sequences=6, **options) as client:
            results, *_ = await asyncio.gather(generate_all(client), *(disturb(client, number) for number in range(40)))
            assert [list(result.token_ids) for result in results] == expected
            async with asyncio.timeout(10):
                while (status := await client.status()).kv.used_blocks:
                    await asyncio.sleep(0.02)
            assert status.requests_running == status.requests_waiting == 0

    run(scenario(), timeout_s=120)


def test_seeded_sampling_is_the_same_for_any_stages_micro_batches_and_neighbours(checkpoint: Path) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.9, "seed": 11, "n": 2, "presence_penalty": 0.5, "logit_bias": {7: 1.5}}
    seen: list[list[tuple[int, ...]]] = []

    async def scenario(stages: int, options: dict[str, Any]) -> None:
        async with serving(checkpoint, num_stages=stages, **options) as client:
            results = await generate_all(client, **sampling)
            seen.append([choice.token_ids for result in results for choice in result.choices])

    run(scenario(1, {"num_micro_batches": 1}), timeout_s=60)
    run(scenario(2, {"max_step_tokens": 24}), timeout_s=60)
    run(scenario(3, {"num_micro_batches": 7, "max_sequences": 3}), timeout_s=60)
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0])) > COUNT, "choices differ from each other"


def test_logprobs_of_prompt_and_text_are_the_models(checkpoint: Path) -> None:
    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = distinct_prompts(8)[7]

    async def scenario() -> Generation:
        async with serving(checkpoint, num_stages=2, max_step_tokens=16) as client:
            return await client.generate(prompt, max_new_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)

    result = run(scenario(), timeout_s=60)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(result.token_ids)])).logits[0].log_softmax(-1)
    scored = [*result.prompt_logprobs, *result.logprobs]
    following = [*prompt[1:], *result.token_ids]
    assert [one.token_id for one in scored] == following
    for row, (one, token_id) in enumerate(zip(scored, following, strict=True)):
        assert one.logprob == pytest.approx(float(logits[row, token_id]), abs=1e-4)
        assert one.rank == int((logits[row] > logits[row, token_id]).sum()) + 1
    assert {len(one.top) for one in result.logprobs} == {3}
    assert all(one.top[0].token_id == one.token_id for one in result.logprobs), "greedy takes the likeliest"


def test_stop_tokens_least_tokens_and_priorities(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with serving(checkpoint, num_stages=2) as client:
            whole = await client.generate("to be", max_new_tokens=12, ignore_eos=True)
            stop = whole.token_ids[2]
            stopped = await client.generate("to be", max_new_tokens=12, ignore_eos=True, stop_token_ids=[stop])
            assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
            assert stopped.finish_reason.value == "stop"
            later = await client.generate("to be", max_new_tokens=12, ignore_eos=True, stop_token_ids=[stop], min_tokens=9)
            assert len(later.token_ids) >= 9
            assert stop not in later.token_ids[:8]
            assert (await client.generate("a", max_new_tokens=2, priority=5)).usage.completion_tokens <= 2

    run(scenario(), timeout_s=60)


def test_a_client_that_leaves_takes_its_requests_with_it(checkpoint: Path) -> None:
    async def scenario() -> None:
        config = ServiceConfig(checkpoint=checkpoint, num_stages=2, threads_per_stage=1)
        async with Service.open(config) as service:
            address = await service.listen("tcp://127.0.0.1:0")
            async with connect(address) as stays:
                async with connect(address) as leaves:
                    stream = leaves.stream("to be", max_new_tokens=140, ignore_eos=True)
                    await anext(stream)
                    assert (await stays.status()).requests_running == 1
                async with asyncio.timeout(5):
                    while (status := await stays.status()).requests_running or status.kv.used_blocks:
                        await asyncio.sleep(0.02)
                assert status.requests_finished == 1

    run(scenario(), timeout_s=60)
