"""A decoder's sizes by its config.json, whatever its family calls them. Both roles read it, so this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncpipe.errors import Invalid

_GPT2_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
_GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3 = _GEMMA | {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "opt": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"rope_theta": 1_000_000.0},
    "qwen3": {"head_dim": 128},
    "phi3": {"original_max_position_embeddings": 4096},
    "gemma2": _GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _GEMMA3,
}
"""What transformers takes for fields that published configurations leave out."""


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json on one level, in common names and with its family's defaults: the text part of a multimodal model, and
    GPT-2's `n_layer` as `num_hidden_layers`."""
    text = config.get("text_config")
    fields = {**config, **text, "architectures": config.get("architectures")} if isinstance(text, dict) else dict(config)
    model_type = fields.get("model_type")
    if model_type == "gpt2":
        fields |= {common: fields[name] for name, common in _GPT2_NAMES.items() if name in fields}
    return {**_DEFAULTS.get(str(model_type), {}), **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """`ffn_size` is a dense feed-forward part's; `inner_size` counts the numbers of a token within that part, of all its
    projections and of all experts that a token goes through."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context_len: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    inner_size: int
    has_tied_head: bool

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
        """Of `model_fields`. Raises Invalid for a configuration that cannot be; `where` it is from."""
        hidden, heads = _size(fields, "hidden_size", where), _size(fields, "num_attention_heads", where)
        kv_heads = heads if fields.get("num_key_value_heads") is None else _size(fields, "num_key_value_heads", where)
        if fields.get("head_dim") is None and hidden % heads:
            raise Invalid(f"{where}: hidden_size {hidden} cannot be divided among {heads} heads")
        if heads % kv_heads:
            raise Invalid(f"{where}: {heads} heads cannot share {kv_heads} key-value heads evenly")
        ffn_size = _ffn_size(fields, hidden, where)
        return cls(
            num_layers=_size(fields, "num_hidden_layers", where),
            hidden_size=hidden,
            vocab_size=_size(fields, "vocab_size", where),
            max_context_len=_size(fields, "max_position_embeddings", where),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=hidden // heads if fields.get("head_dim") is None else _size(fields, "head_dim", where),
            ffn_size=ffn_size,
            inner_size=_inner_size(fields, ffn_size),
            has_tied_head=bool(fields.get("tie_word_embeddings", False)),
        )


def num_experts(fields: Mapping[str, Any]) -> int:
    """Of a layer's feed-forward part; 0 for a dense one."""
    return int(fields.get("num_local_experts") or fields.get("num_experts") or 0)


def is_sparse(fields: Mapping[str, Any], layer: int) -> bool:
    """Whether the layer's feed-forward part is of experts."""
    step = fields.get("decoder_sparse_step") or 1
    return num_experts(fields) > 0 and layer not in (fields.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _ffn_size(fields: Mapping[str, Any], hidden: int, where: str) -> int:
    if "ffn_dim" in fields or fields.get("model_type") == "opt":
        return _size(fields, "ffn_dim", where)
    if fields.get("model_type") == "gpt2" and fields.get("intermediate_size") is None:
        return 4 * hidden
    return _size(fields, "intermediate_size", where)


def _inner_size(fields: Mapping[str, Any], ffn_size: int) -> int:
    if num_experts(fields):
        return 2 * int(fields.get("num_experts_per_tok", 1)) * int(fields.get("moe_intermediate_size", ffn_size))
    return ffn_size if fields.get("model_type") in ("opt", "gpt2") else 2 * ffn_size


def _size(fields: Mapping[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or not 0 < value < 2**31:
        raise Invalid(f"{where}: {name} is {value!r}; it must be a positive number")
    return value
