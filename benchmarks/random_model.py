"""A random OPT on disk: as fast as a trained one."""

from __future__ import annotations

from pathlib import Path


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
