"""A random OPT or Llama on disk: as fast as a trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


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


OPT_125M = Shape(hidden=768, layers=12, vocab=50_272)


class LlamaShape(NamedTuple):
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


class MoEShape(NamedTuple):
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    chosen: int
    expert_size: int
    vocab: int


class _Checkpoint:
    """Random tensors, stored as `dtype`, a file for each layer, so that no more than a layer is ever in memory."""

    def __init__(self, directory: Path, dtype: str) -> None:
        import torch

        directory.mkdir(parents=True)
        self._directory = directory
        self._dtype = getattr(torch, dtype)
        self._numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
        self._weight_map: dict[str, str] = {}
        self.num_bytes = 0

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        numbers = self._numbers
        return numbers.repeat(-(-rows * columns // len(numbers)))[: rows * columns].view(rows, columns).clone()

    def save(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.to(self._dtype) for name, tensor in tensors.items()}
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._weight_map.update(dict.fromkeys(tensors, file))
        save_file(tensors, self._directory / file, metadata={"format": "pt"})

    def finish(self, config: PretrainedConfig) -> None:
        from tokenizers import Tokenizer, models

        index = json.dumps({"metadata": {}, "weight_map": self._weight_map})
        (self._directory / "model.safetensors.index.json").write_text(index)
        config.save_pretrained(self._directory)
        Tokenizer(models.BPE(vocab={"a": 4}, merges=[])).save(str(self._directory / "tokenizer.json"))


def make_large_model(directory: Path, shape: Shape, *, dtype: str = "float32") -> int:
    """A random OPT, with a file for each layer; returns its bytes."""
    import torch
    from transformers import OPTConfig

    hidden, checkpoint, prefix = shape.hidden, _Checkpoint(directory, dtype), "model.decoder"

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(hidden), f"{name}.bias": torch.zeros(hidden)}

    def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": checkpoint.matrix(rows, columns), f"{name}.bias": torch.zeros(rows)}

    tables = {"embed_tokens": checkpoint.matrix(shape.vocab, hidden), "embed_positions": checkpoint.matrix(2050, hidden)}
    outer = {f"{prefix}.{name}.weight": table for name, table in tables.items()}
    checkpoint.save("outer.safetensors", outer | norm(f"{prefix}.final_layer_norm"))
    for layer in range(shape.layers):
        name = f"{prefix}.layers.{layer}"
        tensors = norm(f"{name}.self_attn_layer_norm") | norm(f"{name}.final_layer_norm")
        for part in ("q", "k", "v", "out"):
            tensors |= linear(f"{name}.self_attn.{part}_proj", hidden, hidden)
        tensors |= linear(f"{name}.fc1", 4 * hidden, hidden) | linear(f"{name}.fc2", hidden, 4 * hidden)
        checkpoint.save(f"layer-{layer:03}.safetensors", tensors)
    config = OPTConfig(
        architectures=["OPTForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        dtype=dtype,
    )
    checkpoint.finish(config)
    return checkpoint.num_bytes


def _outer(checkpoint: _Checkpoint, vocab: int, hidden: int) -> dict[str, torch.Tensor]:
    """Of a Llama or its like."""
    import torch

    return {
        "model.embed_tokens.weight": checkpoint.matrix(vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": checkpoint.matrix(vocab, hidden),
    }


def _attention_sizes(hidden: int, q_size: int, kv_size: int) -> dict[str, tuple[int, int]]:
    sizes = {"q_proj": (q_size, hidden), "k_proj": (kv_size, hidden), "v_proj": (kv_size, hidden), "o_proj": (hidden, q_size)}
    return {f"self_attn.{name}": size for name, size in sizes.items()}


def make_large_llama(directory: Path, shape: LlamaShape, *, dtype: str = "float32") -> int:
    """A random Llama, with a file for each layer and a head of its own; returns its bytes."""
    import torch
    from transformers import LlamaConfig

    hidden, checkpoint = shape.hidden, _Checkpoint(directory, dtype)
    checkpoint.save("outer.safetensors", _outer(checkpoint, shape.vocab, hidden))
    sizes = _attention_sizes(hidden, hidden, shape.kv_heads * (hidden // shape.heads)) | {
        "mlp.gate_proj": (shape.intermediate, hidden),
        "mlp.up_proj": (shape.intermediate, hidden),
        "mlp.down_proj": (hidden, shape.intermediate),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": checkpoint.matrix(*size) for name, size in sizes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden)
        checkpoint.save(f"layer-{layer:03}.safetensors", tensors)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        dtype=dtype,
    )
    checkpoint.finish(config)
    return checkpoint.num_bytes


def make_large_moe(directory: Path, shape: MoEShape, *, dtype: str = "float32") -> int:
    """A random Qwen 3 with experts, likewise."""
    import torch
    from transformers import Qwen3MoeConfig

    hidden, checkpoint = shape.hidden, _Checkpoint(directory, dtype)
    checkpoint.save("outer.safetensors", _outer(checkpoint, shape.vocab, hidden))
    sizes = _attention_sizes(hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size) | {
        "mlp.gate": (shape.experts, hidden),
    }
    for expert in range(shape.experts):
        parts = {"gate": (shape.expert_size, hidden), "up": (shape.expert_size, hidden), "down": (hidden, shape.expert_size)}
        sizes |= {f"mlp.experts.{expert}.{part}_proj": size for part, size in parts.items()}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": shape.head_size, "self_attn.k_norm": shape.head_size}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": checkpoint.matrix(*size) for name, size in sizes.items()}
        tensors |= {f"{prefix}.{name}.weight": torch.ones(size) for name, size in norms.items()}
        # Else all rows would choose the same experts.
        tensors[f"{prefix}.mlp.gate.weight"] = torch.randn(
            shape.experts, hidden, generator=torch.Generator().manual_seed(layer)
        )
        checkpoint.save(f"layer-{layer:03}.safetensors", tensors)
    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        moe_intermediate_size=shape.expert_size,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    checkpoint.finish(config)
    return checkpoint.num_bytes
