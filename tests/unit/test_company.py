"""With compiled kernels, what a sequence is given does not depend on what else is in its batch, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asyncpipe.wire.messages import Delta
from asyncpipe_workers import stage_model
from asyncpipe_workers.sampling import Sampled
from tests.checkpoints import distinct_prompts, make_opt
from tests.families import make_family
from tests.stage_chains import Chain, joining, load_chain, opened

TOKEN = 5  # is always taken


def logits_of(path: Path, layers: int, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """(sequences, steps, vocabulary)."""
    seen: list[torch.Tensor] = []

    def sample(logits: torch.Tensor, samplers: Any) -> Sampled:
        seen.append(logits.clone())
        return Sampled((TOKEN,) * len(logits))

    monkeypatch.setattr(stage_model, "sample", sample)
    chain = Chain(load_chain(path, (layers,)))
    chain(joining(*(opened(n, prompt) for n, prompt in enumerate(prompts))))
    for _ in range(3):
        chain(Delta(token_ids=(TOKEN,) * len(prompts)))
    chain.close()
    return torch.stack(seen, dim=1)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("family", ["opt", "llama-tied", "qwen3", "gemma2", "qwen3-moe"])
def test_logits_do_not_depend_on_company(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_opt(tmp_path, shape="opt-iml", layers=3) if family == "opt" else make_family(tmp_path, family)
    prompts = distinct_prompts(7)
    together = logits_of(path, 3, prompts, monkeypatch)
    assert together.shape[:2] == (7, 4)
    for prompt, expected in zip(prompts, together, strict=True):
        assert torch.equal(logits_of(path, 3, [prompt], monkeypatch)[0], expected)
