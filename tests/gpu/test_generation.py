"""The product on CUDA: two stages that share one card give Hugging Face's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import distinct_prompts, make_opt, reference_generate
from tests.cluster.test_generation import NUM_TOKENS, generate_all, serving
from tests.support import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


@pytest.mark.parametrize("stages", [1, 2])
def test_tokens_equal_hugging_face(stages: int, tmp_path: Path) -> None:
    path = make_opt(tmp_path)
    prompts = distinct_prompts(11)

    async def scenario() -> list[list[int]]:
        async with serving(path, num_stages=stages, device="cuda:0", dtype="float32") as client:
            return await generate_all(client, prompts)

    assert run(scenario(), timeout_s=120) == reference_generate(path, prompts, max_new_tokens=NUM_TOKENS)
