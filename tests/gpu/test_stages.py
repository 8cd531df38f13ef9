"""Whole stages on a card: wherever their bytes live, and what their host waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asyncpipe.policy import Compression, Policy
from asyncpipe.wire.messages import Delta
from tests.checkpoints import distinct_prompts, make_opt, reference_generate
from tests.emulated_cuda import emulated_cuda
from tests.families import make_family
from tests.gpu.conftest import OWN_KERNELS
from tests.stage_chains import Chain, joining, load_chain, opened
from tests.unit import test_hugging_face as hugging_face

NUM_TOKENS = 10
POLICIES: dict[str, dict[str, Any]] = {
    "weights on the host": {"w_gpu_percent": 0, "w_cpu_percent": 100},
    "weights on disk": {"w_gpu_percent": 0, "w_cpu_percent": 0},
    "weights everywhere, not pinned": {"w_gpu_percent": 30, "w_cpu_percent": 30, "pin_weight": False},
    "no overlap": {"w_gpu_percent": 30, "w_cpu_percent": 30, "overlap": False},
    "keys and values everywhere": {"cache_gpu_percent": 30, "cache_cpu_percent": 40},
    "activations everywhere": {"act_gpu_percent": 30, "act_cpu_percent": 30},
    "everything everywhere": {
        **{"w_gpu_percent": 30, "w_cpu_percent": 30, "cache_gpu_percent": 30, "cache_cpu_percent": 40},
        **{"act_gpu_percent": 30, "act_cpu_percent": 30, "sep_layer": True},
    },
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("split", [(4,), (3, 1)])
def test_tokens_are_the_same_wherever_bytes_live(
    policy: str, split: tuple[int, ...], card: torch.device, tmp_path: Path
) -> None:
    path, prompts = make_opt(tmp_path / "model"), distinct_prompts(7, seed=5)
    placed = Policy(gpu_batch_size=3, num_gpu_batches=3, **POLICIES[policy])
    chain = Chain(load_chain(path, split, device=str(card), policy=placed, offload_dir=str(tmp_path / "offload")))
    found = chain.generate(prompts, max_new_tokens=NUM_TOKENS, chunk=7)
    chain.close()
    assert found == reference_generate(path, prompts, max_new_tokens=NUM_TOKENS)


@pytest.mark.parametrize("mode", [{"compress_weight": True, "w_gpu_percent": 20, "w_cpu_percent": 40}, {"attn_sparsity": 0.5}])
def test_compressed_and_sparse_modes_give_what_they_give_on_a_cpu(
    mode: dict[str, Any], card: torch.device, tmp_path: Path
) -> None:
    path, prompts = make_opt(tmp_path / "model"), distinct_prompts(7, seed=5)
    policy = Policy(cache_gpu_percent=30, cache_cpu_percent=40, comp_weight_config=Compression(group_size=16), **mode)
    found = []
    for device in ("cpu", str(card)):
        chain = Chain(load_chain(path, (3, 1), device=device, policy=policy, offload_dir=str(tmp_path / "offload")))
        found.append(chain.generate(prompts, max_new_tokens=NUM_TOKENS))
        chain.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("model_type", hugging_face.FAMILIES)
def test_transformers_layers_run_and_are_captured(
    model_type: str, card: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, prompts = hugging_face.make(tmp_path, model_type), distinct_prompts(4, seed=1, longest=20)
    chain = Chain(load_chain(path, (2, 1), device=str(card), model_impl="transformers"))
    expected = hugging_face.expected_tokens(path, prompts, NUM_TOKENS)
    assert chain.generate(prompts, max_new_tokens=NUM_TOKENS, chunk=7) == expected
    assert not caplog.records, "a step could not be captured"


@OWN_KERNELS
@pytest.mark.parametrize("graphs", ["0", "1"])
@pytest.mark.parametrize("model", ["llama3", "gemma2", "phi3-long", "starcoder2"])
def test_the_host_waits_once_a_step(model: str, graphs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first stage for hidden states that are to be sent, a last one for tokens."""
    monkeypatch.setenv("ASYNCPIPE_CUDA_GRAPHS", graphs)
    is_native = model not in hugging_face.FAMILIES
    path = make_family(tmp_path, model) if is_native else hugging_face.make(tmp_path, model)
    with emulated_cuda() as machine:
        chain = Chain(load_chain(path, (2, 1), device="cuda:1", model_impl="native" if is_native else "transformers"))
        tokens = chain(joining(*(opened(n, prompt) for n, prompt in enumerate(distinct_prompts(3)))))
        for _ in range(6):
            tokens = chain(Delta(token_ids=tokens))
        machine.waits.clear()
        for _ in range(3):
            tokens = chain(Delta(token_ids=tokens))
        assert machine.waits == ["an event", "a copy to the host"] * 3
