"""Stages whose bytes live on several tiers, in the whole product: the same tokens, bytes where they were asked for, a ceiling
on memory, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncpipe import Client, Policy, StageLost, connect
from asyncpipe.testing.memory_limit import join, leave, memory_limit
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.service import Service
from tests.checkpoints import distinct_prompts, make_opt, reference_generate
from tests.support import run

NUM_TOKENS = 12
EVERYWHERE = {
    "w_gpu_percent": 20.0,
    "w_cpu_percent": 30.0,
    "cache_gpu_percent": 30.0,
    "cache_cpu_percent": 30.0,
    "act_gpu_percent": 40.0,
    "act_cpu_percent": 30.0,
}
FROM_DISK = {"w_gpu_percent": 0.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def serving(path: Path, *, offload_dir: Path, policy: dict[str, Any], **options: Any) -> AsyncIterator[Client]:
    config = ServiceConfig(
        checkpoint=path, threads_per_stage=1, policy=Policy(**policy), offload_dir=offload_dir, kv_bytes=64 << 20, **options
    )
    async with Service.open(config) as service, connect(await service.listen("memory://clients")) as client:
        yield client


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (1, 3), (2, None), (3, 5)])
def test_tokens_equal_hugging_face_with_everything_everywhere(
    stages: int, micro_batches: int | None, checkpoint: Path, tmp_path: Path
) -> None:
    prompts = distinct_prompts(13, seed=stages)

    async def scenario() -> list[list[int]]:
        policy = {"gpu_batch_size": 2, "num_gpu_batches": 2, **EVERYWHERE}
        options = {"num_stages": stages, "num_micro_batches": micro_batches, "max_step_tokens": 40}
        async with serving(checkpoint, offload_dir=tmp_path, policy=policy, **options) as client:
            results = await asyncio.gather(
                *(client.generate(prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True, timeout_s=60) for prompt in prompts)
            )
            for stage in (await client.status()).stages:
                assert stage.transfers.weights.num_bytes > 0
                assert stage.transfers.cache_stores.num_bytes > 0
                assert stage.transfers.activations.num_bytes > 0
                for tiers, percents in ((stage.tiers.weights, (20, 30, 50)), (stage.tiers.cache, (30, 30, 40))):
                    realised = [100 * part / tiers.total for part in (tiers.device, tiers.host, tiers.disk)]
                    assert realised == pytest.approx(percents, abs=1.0)
        return [list(result.token_ids) for result in results]

    assert run(scenario(), timeout_s=100) == reference_generate(checkpoint, prompts, max_new_tokens=NUM_TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_micro_batches_that_wait_share_a_pass_over_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    """On one stage all of them wait. So a pass serves more than one step."""
    steps = passes = 0.0

    async def scenario() -> None:
        nonlocal steps, passes
        policy = {"gpu_batch_size": 4, **FROM_DISK}
        async with serving(checkpoint, offload_dir=tmp_path, policy=policy, num_micro_batches=3) as client:
            await asyncio.gather(
                *(client.generate(prompt, max_new_tokens=60, ignore_eos=True) for prompt in distinct_prompts(12, longest=8))
            )
            stage = (await client.status()).stages[0]
            steps, passes = stage.steps, stage.transfers.weights.num_bytes / stage.tiers.weights.disk

    run(scenario(), timeout_s=60)
    assert passes < 0.75 * steps, f"{passes:.0f} passes for {steps} steps"


def test_a_killed_run_leaves_nothing_in_the_offload_folder(checkpoint: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        policy = {"cache_gpu_percent": 0.0, "act_gpu_percent": 0.0, **FROM_DISK}
        async with serving(checkpoint, offload_dir=tmp_path, policy=policy, max_restarts=0) as client:
            pid = (await client.status()).stages[0].pid
            with pytest.raises(StageLost):
                async for piece in client.stream("to be", max_new_tokens=100, ignore_eos=True):
                    if piece.index == 3:
                        os.kill(pid, signal.SIGKILL)

    run(scenario(), timeout_s=60)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_cut_short_while_it_is_used_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """The file is whole at the start; then somebody truncates it. Another worker finds it no better."""
    model = make_opt(tmp_path / "model", max_positions=2048)

    async def scenario() -> None:
        async with serving(model, offload_dir=tmp_path / "offload", policy=FROM_DISK) as client:
            with pytest.raises(StageLost, match=r"could not be replaced: .*model\.safetensors is not a whole safetensors file"):
                async for piece in client.stream("to be", max_new_tokens=1500, ignore_eos=True):
                    if piece.index == 2:
                        os.truncate(model / "model.safetensors", 4096)

    run(scenario(), timeout_s=60)


WEIGHT_BYTES = 1_315_758_080 * 4  # of OPT-1.3b in float32


@asynccontextmanager
async def limited_service(config: ServiceConfig, group: Path | None) -> AsyncIterator[Service]:
    """Its workers live in the control group; this process is there only while it starts them."""
    async with AsyncExitStack() as resources:
        with ExitStack() as membership:
            if group is not None:
                join(group)
                membership.callback(leave, group)
            service = await resources.enter_async_context(Service.open(config))
        yield service


def test_a_model_runs_in_a_fraction_of_its_weights_memory(tmp_path: Path) -> None:
    """OPT-1.3b's shape, all of it on disk. The worker's peak, its libraries included, stays under a quarter of its weights; and
    where a control group can be made, the kernel gives it half of them, page cache included, and not a byte more."""
    peak_bytes = 0

    async def scenario() -> None:
        nonlocal peak_bytes
        config = ServiceConfig(
            checkpoint=Path("facebook/opt-1.3b"),
            dummy_weights=True,
            policy=Policy(gpu_batch_size=4, **FROM_DISK),
            offload_dir=tmp_path,
            kv_bytes=1 << 30,
            load_timeout_s=100,
        )
        with memory_limit(WEIGHT_BYTES // 2) as group:
            async with limited_service(config, group) as service, connect(await service.listen("memory://clients")) as client:
                result = await client.generate([5, 6, 7, 8], max_new_tokens=2, ignore_eos=True, timeout_s=100)
                assert len(result.token_ids) == 2
                stage = (await client.status()).stages[0]
                assert stage.tiers.weights.disk == WEIGHT_BYTES
                peak_bytes = stage.peak_host_bytes

    run(scenario(), timeout_s=200)
    assert peak_bytes < WEIGHT_BYTES / 4, f"{peak_bytes / 1e9:.2f} GB"


def test_few_bits_keep_the_bundled_models_perplexity(tmp_path: Path) -> None:
    """On text that it was not trained on: this project's own source."""
    from tokenizers import Tokenizer

    from asyncpipe.model_place import BUNDLED_MODEL

    tokenizer = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    sources = sorted((Path(__file__).parents[2] / "asyncpipe").rglob("*.py"))
    prompts = [ids[:500] for source in sources if len(ids := tokenizer.encode(source.read_text()).ids) > 200][:16]
    assert len(prompts) == 16

    async def perplexity(quantize: str | None = None, kv_dtype: str = "auto", **policy: Any) -> float:
        """Prompts are computed in chunks of 32, so that most attention is to what the cache holds."""
        options = {"max_step_tokens": 32, "quantize": quantize, "kv_dtype": kv_dtype}
        async with serving(BUNDLED_MODEL, offload_dir=tmp_path, policy=policy, **options) as client:
            results = await asyncio.gather(
                *(client.generate(prompt, max_new_tokens=1, prompt_logprobs=0, timeout_s=100) for prompt in prompts)
            )
        logprobs = [token.logprob for result in results for token in result.prompt_logprobs]
        return math.exp(-sum(logprobs) / len(logprobs))

    async def scenario() -> dict[str, float]:
        exact = await perplexity()
        return {
            "weights in 4 bits": await perplexity(compress_weight=True) / exact,
            "cache in 4 bits": await perplexity(compress_cache=True) / exact,
            "cache in float16": await perplexity(kv_dtype="float16") / exact,
            "int8": await perplexity("int8") / exact,
            "int4": await perplexity("int4") / exact,
        }

    ratios = run(scenario(), timeout_s=110)
    limits = {"weights in 4 bits": 1.02, "cache in 4 bits": 1.02, "cache in float16": 1.0001, "int8": 1.01, "int4": 1.03}
    assert all(ratios[name] < limit for name, limit in limits.items()), json.dumps(ratios)


@pytest.mark.parametrize(("safe", "compress"), [(False, False), (True, True)], ids=["bin", "compressed"])
def test_what_cannot_be_read_in_place_is_converted_once(
    safe: bool, compress: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second start finds what the first one made, and no run makes a copy of its own."""
    caplog.set_level("INFO")
    model = make_opt(tmp_path / "model", safe=safe)
    policy = {"gpu_batch_size": 4, "compress_weight": compress, **FROM_DISK}
    answers: list[tuple[int, ...]] = []
    times: set[int] = set()

    async def scenario() -> None:
        async with serving(model, offload_dir=tmp_path / "offload", policy=policy) as client:
            answers.append((await client.generate([5, 6, 7], max_new_tokens=NUM_TOKENS, ignore_eos=True)).token_ids)
            stage = (await client.status()).stages[0]
            assert stage.policy.compress_weight == compress
        (made,) = (tmp_path / "offload" / "converted").iterdir()
        times.add((made / "asyncpipe.json").stat().st_mtime_ns)

    for _ in range(2):
        run(scenario(), timeout_s=60)
    assert answers[0] == answers[1]
    assert len(times) == 1
    assert sum("once" in record.message for record in caplog.records) == 1
    assert [path.name for path in (tmp_path / "offload").iterdir()] == ["converted"]


def test_where_nothing_can_be_kept_weights_are_quantized_at_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_opt(tmp_path / "model")
    (tmp_path / "offload").mkdir()
    (tmp_path / "offload" / "converted").write_text("in the way")

    async def scenario() -> None:
        async with serving(model, offload_dir=tmp_path / "offload", policy={}, quantize="int8") as client:
            assert len((await client.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True)).token_ids) == 4

    run(scenario(), timeout_s=60)
    assert any("the weights are quantized at every start" in record.message for record in caplog.records)
