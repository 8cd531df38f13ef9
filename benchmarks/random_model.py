"""A random OPT on disk: as fast as a trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


def make_model(directory: Path, *, quick: bool) -> int:
    """A random OPT in float32; returns its vocabulary's size."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import OPTConfig, OPTForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    hidden, layers, vocab = (384, 12, 4096) if quick else (768, 12, 8192)
    config = OPTConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    OPTForCausalLM(config).save_pretrained(directory)
    Tokenizer(models.BPE(vocab={"a": 4}, merges=[])).save(str(directory / "tokenizer.json"))
    return vocab


class Shape(NamedTuple):
    hidden: int
    layers: int
    vocab: int


def make_large_model(directory: Path, shape: Shape) -> int:
    """A random OPT in float32, a file for each layer, so that no more than a layer is ever in memory; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import OPTConfig

    hidden, num_bytes, weight_map = shape.hidden, 0, {}
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return numbers.repeat(-(-rows * columns // len(numbers)))[: rows * columns].view(rows, columns).clone()

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(hidden), f"{name}.bias": torch.zeros(hidden)}

    def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": matrix(rows, columns), f"{name}.bias": torch.zeros(rows)}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal num_bytes
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        weight_map.update(dict.fromkeys(tensors, file))
        save_file(tensors, directory / file, metadata={"format": "pt"})

    directory.mkdir(parents=True)
    prefix = "model.decoder"
    tables = {"embed_tokens": matrix(shape.vocab, hidden), "embed_positions": matrix(2050, hidden)}
    outer = {f"{prefix}.{name}.weight": table for name, table in tables.items()}
    save("outer.safetensors", outer | norm(f"{prefix}.final_layer_norm"))
    for layer in range(shape.layers):
        name = f"{prefix}.layers.{layer}"
        tensors = norm(f"{name}.self_attn_layer_norm") | norm(f"{name}.final_layer_norm")
        for part in ("q", "k", "v", "out"):
            tensors |= linear(f"{name}.self_attn.{part}_proj", hidden, hidden)
        save(
            f"layer-{layer:03}.safetensors",
            tensors | linear(f"{name}.fc1", 4 * hidden, hidden) | linear(f"{name}.fc2", hidden, 4 * hidden),
        )
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = OPTConfig(
        architectures=["OPTForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        dtype="float32",
    )
    config.save_pretrained(directory)
    Tokenizer(models.BPE(vocab={"a": 4}, merges=[])).save(str(directory / "tokenizer.json"))
    return num_bytes
