"""What the names of a checkpoint's files and tensors say."""

from __future__ import annotations

import re
from typing import NamedTuple

MANIFEST = "asyncpipe.json"  # of a checkpoint that `convert` has made
QUANTIZED_SUFFIXES = (".q4", ".q8")  # of the names of tensors that `convert` has stored in few bits, as rows of bytes
HEAD = "lm_head.weight"
TABLES = ("decoder.embed_tokens.weight", "embed_tokens.weight", "wte.weight")  # of tokens' embeddings; a tied head is one
PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "transformer.")

_LAYER = re.compile(r"(?:decoder\.)?(?:layers|h)\.(\d+)\.(.+)")
_ATTENTION_STARTS = ("self_attn", "attn", "input_layernorm", "ln_1")


class LayerName(NamedTuple):
    """`rest` is the name within the decoder layer: "self_attn.q_proj.weight"."""

    layer: int
    rest: str

    @property
    def is_attention(self) -> bool:
        return self.rest.startswith(_ATTENTION_STARTS)


def plain_name(stored_name: str) -> str:
    """Without what causal language models put before a decoder's names: "layers.0.mlp.up_proj.weight"."""
    prefix = next((each for each in PREFIXES if stored_name.startswith(each)), "")
    return stored_name.removeprefix(prefix)


def quantized_suffix(num_bits: int) -> str:
    return f".q{num_bits}"


def layer_name(name: str) -> LayerName | None:
    """Of a plain name; None for a tensor that belongs to no decoder layer."""
    found = _LAYER.fullmatch(name)
    return None if found is None else LayerName(int(found[1]), found[2])
