"""Small random checkpoints in every shape of OPT, with tokenizers, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "prenorm": {},
    "untied": {"tie_word_embeddings": False},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "galactica": {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False},
    "opt-iml": {"ffn_dim": 96, "num_attention_heads": 2},
}
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x): return x + 1",
    "naïve café — 東京 🙂",
    "to be or not to be",
]


def make_opt(
    directory: Path,
    *,
    shape: str = "prenorm",
    layers: int = 4,
    max_positions: int = 160,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    safe: bool = True,
    **more: object,
) -> Path:
    """Save a random OPT under `directory` and return it; `more` are fields of its configuration. Weights are large enough that
    prompts give distinct outputs."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = save_tokenizer(directory)
    fields = {
        "vocab_size": tokenizer,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": max_positions,
        "word_embed_proj_dim": 32,
        "init_std": 0.25,
        "dropout": 0.0,
    }
    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(**(fields | SHAPES[shape] | more))).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that are not trivially zero and one
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if safe:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    else:
        model.config.architectures = ["OPTForCausalLM"]
        model.config.save_pretrained(directory)
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


def save_tokenizer(directory: Path) -> int:
    """Byte-level BPE with OPT's special ids; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())


def reference_generate(directory: Path, prompts: list[list[int]], *, max_new_tokens: int) -> list[list[int]]:
    """Hugging Face's greedy continuation of each prompt by itself, in float32, end-of-sequence ignored."""
    import torch
    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return greedy_tokens(model, prompts, max_new_tokens=max_new_tokens)


def greedy_tokens(model: Any, prompts: list[list[int]], *, max_new_tokens: int) -> list[list[int]]:
    """What transformers' `model` continues each prompt with, by itself, end-of-sequence ignored."""
    import torch

    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def distinct_prompts(count: int, *, vocab_size: int = 320, longest: int = 100, seed: int = 0) -> list[list[int]]:
    """Random prompts of different lengths from 1 to `longest`."""
    import random

    generator = random.Random(seed)
    lengths = [1, longest, *(generator.randint(2, longest - 1) for _ in range(count - 2))]
    return [[generator.randrange(4, vocab_size) for _ in range(length)] for length in lengths[:count]]
