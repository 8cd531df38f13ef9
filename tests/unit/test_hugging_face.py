"""Decoders that have no code of ours: transformers' layers on our stages give what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncpipe.errors import Invalid
from tests.checkpoints import distinct_prompts, save_tokenizer
from tests.stage_chains import Chain, load_chain

FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.5},
    "starcoder2": {"sliding_window": 9, "use_bias": True},
    "gemma": {"head_dim": 16},
}


def make(directory: Path, model_type: str, *, layers: int = 3) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        "vocab_size": save_tokenizer(directory),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "initializer_range": 0.25,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(fields | FAMILIES[model_type]))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def expected_tokens(path: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(count):
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tokens_are_transformers_own(model_type: str, tmp_path: Path) -> None:
    path, prompts = make(tmp_path, model_type), distinct_prompts(4, seed=1, longest=20)
    expected = expected_tokens(path, prompts, 8)
    for split in ((3,), (1, 2), (1, 1, 1)):
        chain = Chain(load_chain(path, split, model_impl="transformers"))
        assert chain.generate(prompts, max_new_tokens=8, chunk=7) == expected


def test_weights_in_few_bits_run_too(tmp_path: Path) -> None:
    path = make(tmp_path, "olmo2")
    (tokens,) = Chain(load_chain(path, (1, 2), quantize="int8")).generate([[5, 6, 7]], max_new_tokens=8)
    assert len(tokens) == 8


def test_a_model_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, "olmo2")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(Invalid, match="'unheard_of' is not supported: this version of transformers"):
        load_chain(path, (3,))


def test_a_model_without_code_of_ours_cannot_be_native(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"Olmo2ForCausalLM.* is not supported; supported: OPTForCausalLM"):
        load_chain(make(tmp_path, "olmo2"), (3,), model_impl="native")
