"""Shapes that need no files, for weights that are random or in a directory without a config.json.

The fields are those of the published config.json files: OPT (Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language
Models", table 1), OPT-IML (Iyer et al. 2022), which has the same shapes, and Galactica (Taylor et al. 2022, table 5), which has
neither biases nor weights of norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class _Shape(NamedTuple):
    num_layers: int
    num_heads: int
    hidden_size: int
    others: Mapping[str, Any] = MappingProxyType({})


_OPT = {
    "125m": _Shape(12, 12, 768),
    "350m": _Shape(24, 16, 1024, {"do_layer_norm_before": False, "word_embed_proj_dim": 512}),
    "1.3b": _Shape(24, 32, 2048),
    "2.7b": _Shape(32, 32, 2560),
    "6.7b": _Shape(32, 32, 4096),
    "13b": _Shape(40, 40, 5120),
    "30b": _Shape(48, 56, 7168),
    "66b": _Shape(64, 72, 9216),
    "175b": _Shape(96, 96, 12288),
    "175b-stage": _Shape(24, 96, 12288),  # a quarter of the layers, to time one of four stages
}
_IML_SIZES = ("1.3b", "30b", "175b")
_GALACTICA = {
    "125m": _Shape(12, 12, 768),
    "1.3b": _Shape(24, 32, 2048),
    "6.7b": _Shape(32, 32, 4096),
    "30b": _Shape(48, 56, 7168),
    "120b": _Shape(96, 80, 10240),
}
_OPT_FIELDS = {"vocab_size": 50272, "activation_function": "relu", "bos_token_id": 2, "do_layer_norm_before": True}
_GALACTICA_FIELDS = {
    "vocab_size": 50000,
    "activation_function": "gelu",
    "bos_token_id": 0,
    "do_layer_norm_before": True,
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
}


def known_config(name: str) -> dict[str, Any] | None:
    """The config.json of "facebook/opt-1.3b" or "OPT-1.3B"; None for a name that is not known."""
    config = _CONFIGS.get(name.lower().removeprefix("facebook/"))
    return None if config is None else dict(config)


def known_names() -> tuple[str, ...]:
    return tuple(_CONFIGS)


def _config(shape: _Shape, family: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "hidden_size": shape.hidden_size,
        "word_embed_proj_dim": shape.hidden_size,
        "ffn_dim": 4 * shape.hidden_size,
        "max_position_embeddings": 2048,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "dtype": "float16",
        **family,
        **shape.others,
    }


def _all_configs() -> dict[str, dict[str, Any]]:
    configs = {f"opt-{size}": _config(shape, _OPT_FIELDS) for size, shape in _OPT.items()}
    for size in _IML_SIZES:
        configs[f"opt-iml-{size}"] = configs[f"opt-iml-max-{size}"] = configs[f"opt-{size}"]
    return configs | {f"galactica-{size}": _config(shape, _GALACTICA_FIELDS) for size, shape in _GALACTICA.items()}


_CONFIGS = _all_configs()
