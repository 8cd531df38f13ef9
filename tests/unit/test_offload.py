"""Every policy gives Hugging Face's tokens, wherever its bytes live and however they move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncpipe.errors import Invalid
from asyncpipe.policy import Compression, Policy
from asyncpipe_workers import stage_memory
from asyncpipe_workers.memory.quantization import GroupCodec
from tests.checkpoints import SHAPES, distinct_prompts, make_opt, reference_generate
from tests.opt_oracle import OPTOracle
from tests.stage_chains import Chain, load_chain

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return distinct_prompts(7, seed=5)


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    return reference_generate(model, prompts, max_new_tokens=NUM_TOKENS)


def generated(
    model: Path, prompts: list[list[int]], tmp_path: Path, *, split: tuple[int, ...] = (4,), chunk: int = 10**6, **policy: Any
) -> list[list[int]]:
    chain = Chain(load_chain(model, split, policy=Policy(**policy), offload_dir=str(tmp_path / "offload")))
    try:
        return chain.generate(prompts, max_new_tokens=NUM_TOKENS, chunk=chunk)
    finally:
        chain.close()


def percents(what: str, device: float, host: float) -> dict[str, float]:
    return {f"{what}_gpu_percent": device, f"{what}_cpu_percent": host}


TIERS = [(100, 0), (0, 100), (0, 0), (30, 70), (30, 0), (0, 30), (30, 30), (70, 30)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize(("device", "host"), TIERS)
@pytest.mark.parametrize("what", ["w", "cache", "act"])
def test_tokens_are_the_same_wherever_bytes_live(
    what: str,
    device: float,
    host: float,
    sep_layer: bool,
    overlap: bool,
    model: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    policy = {"gpu_batch_size": 3, "num_gpu_batches": 3, "overlap": overlap, "sep_layer": sep_layer}
    assert generated(model, prompts, tmp_path, **policy, **percents(what, device, host)) == expected


MIXED = {**percents("w", 30, 30), **percents("cache", 30, 40), **percents("act", 30, 30)}


@pytest.mark.parametrize("chunk", [7, 10**6])
@pytest.mark.parametrize("split", [(4,), (3, 1)])
@pytest.mark.parametrize("cpu_cache_compute", [True, False])
@pytest.mark.parametrize(("batch", "batches"), [(7, 1), (3, 3), (1, 7)])
def test_tokens_are_the_same_when_everything_is_everywhere(
    batch: int,
    batches: int,
    cpu_cache_compute: bool,
    split: tuple[int, ...],
    chunk: int,
    model: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    policy = {"gpu_batch_size": batch, "num_gpu_batches": batches, "cpu_cache_compute": cpu_cache_compute}
    assert generated(model, prompts, tmp_path, split=split, chunk=chunk, **policy, **MIXED) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_the_same_for_every_shape_of_opt(shape: str, prompts: list[list[int]], tmp_path: Path) -> None:
    model = make_opt(tmp_path / "model", shape=shape)
    expected = reference_generate(model, prompts, max_new_tokens=NUM_TOKENS)
    assert generated(model, prompts, tmp_path, split=(1, 3), gpu_batch_size=4, num_gpu_batches=2, **MIXED) == expected


@pytest.mark.parametrize(("dtype", "safe"), [("float16", True), ("float32", False)])
def test_checkpoints_that_cannot_be_used_as_they_lie_are_converted_on_their_way(
    dtype: str, safe: bool, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Half-precision files for float32 arithmetic, and `.bin` files."""
    model = make_opt(tmp_path / "model", dtype=dtype, safe=safe)
    expected = reference_generate(model, prompts, max_new_tokens=NUM_TOKENS)
    assert generated(model, prompts, tmp_path, **MIXED) == expected


def test_too_little_disk_for_keys_and_values_is_refused_at_the_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_memory, "free_disk_bytes", lambda directory: 1000)
    with pytest.raises(Invalid, match=r"--offload-dir .*offload: keys and values need \d+ bytes there, and 1000 are free"):
        generated(model, [[5]], tmp_path, cache_gpu_percent=0.0)


def test_nothing_is_left_in_the_offload_folder(model: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    generated(model, prompts, tmp_path, **MIXED)
    assert list((tmp_path / "offload").iterdir()) == []


@pytest.mark.parametrize("tiers", [{}, MIXED], ids=["on the device", "everywhere"])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("mode", ["weights", "cache", "both", "sparse"])
def test_compressed_and_sparse_modes_do_the_arithmetic_that_they_say(
    mode: str, batches: int, tiers: dict[str, float], model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    codec, compression = GroupCodec(16), Compression(group_size=16)
    policy: dict[str, Any] = {"gpu_batch_size": 3, "num_gpu_batches": batches, **tiers}
    oracle: dict[str, Any] = {}
    if mode in ("weights", "both"):
        policy |= {"compress_weight": True, "comp_weight_config": compression}
        oracle["weight_codec"] = codec
    if mode in ("cache", "both"):
        policy |= {"compress_cache": True, "comp_cache_config": compression}
        oracle["cache_codec"] = codec
    if mode == "sparse":
        policy["attn_sparsity"] = oracle["sparsity"] = 0.3
    straight = OPTOracle(model, **oracle)
    expected = [straight.generate(prompt, NUM_TOKENS) for prompt in prompts]
    assert generated(model, prompts, tmp_path, **policy) == expected
    assert expected != [OPTOracle(model).generate(prompt, NUM_TOKENS) for prompt in prompts], "the mode makes a difference"
