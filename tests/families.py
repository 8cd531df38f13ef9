"""Small random checkpoints of every family, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.checkpoints import greedy_tokens

WINDOW = 12  # shorter than most prompts
CONTEXT = 160


class Variant(NamedTuple):
    """Names of transformers' classes, and fields that are not the common ones."""

    config: str
    model: str
    fields: Mapping[str, Any] = {}


_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 40}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 48,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
_EXPERTS = {"num_experts": 5, "moe_intermediate_size": 24, "head_dim": 16, "num_experts_per_tok": 2}

VARIANTS: dict[str, Variant] = {
    "gpt2": Variant("GPT2Config", "GPT2LMHeadModel", {"n_head": 4, "n_layer": 3, "n_embd": 32, "n_positions": CONTEXT}),
    "gpt2-scaled": Variant(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_head": 2, "n_layer": 3, "n_embd": 32, "n_positions": CONTEXT, "n_inner": 80}
        | {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
    ),
    "llama": Variant("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "llama-tied": Variant("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True, "num_attention_heads": 2}),
    "llama-biased": Variant("LlamaConfig", "LlamaForCausalLM", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Variant(
        "LlamaConfig", "LlamaForCausalLM", _GROUPED | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    ),
    "llama3": Variant("LlamaConfig", "LlamaForCausalLM", _GROUPED | {"rope_parameters": LLAMA3}),
    "llama-yarn": Variant("LlamaConfig", "LlamaForCausalLM", _GROUPED | {"rope_parameters": _YARN}),
    "mistral": Variant("MistralConfig", "MistralForCausalLM", _GROUPED | {"sliding_window": WINDOW}),
    "mistral-unlimited": Variant("MistralConfig", "MistralForCausalLM", _GROUPED | {"sliding_window": None, "head_dim": 16}),
    "qwen2": Variant("Qwen2Config", "Qwen2ForCausalLM", _GROUPED | {"sliding_window": WINDOW, "use_sliding_window": False}),
    "qwen2-sliding": Variant(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        _GROUPED | {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": Variant("Qwen3Config", "Qwen3ForCausalLM", _GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Variant(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _GROUPED | _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    ),
    "gemma3": Variant(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _GROUPED | _GEMMA | {"layer_types": _SLIDING, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "phi3": Variant("Phi3Config", "Phi3ForCausalLM", _GROUPED | {"sliding_window": WINDOW}),
    "phi3-long": Variant(
        "Phi3Config", "Phi3ForCausalLM", _GROUPED | {"rope_parameters": LONG, "original_max_position_embeddings": 48}
    ),
    "mixtral": Variant(
        "MixtralConfig", "MixtralForCausalLM", _GROUPED | {"num_local_experts": 5, "sliding_window": WINDOW, "head_dim": 8}
    ),
    "qwen3-moe": Variant(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", _GROUPED | _EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}
    ),
    "qwen3-moe-unscaled": Variant("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _GROUPED | _EXPERTS),
}
_COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def make_family(directory: Path, name: str, *, seed: int = 0, **fields: Any) -> Path:
    """Save a random model of the variant under `directory` and return that; `fields` go before its own. Weights are large
    enough that prompts give distinct outputs."""
    import transformers

    variant = VARIANTS[name]
    common = {} if variant.config == "GPT2Config" else _COMMON
    others = {key: value for key, value in _COMMON.items() if key.endswith("token_id") or key == "vocab_size"}
    config = getattr(transformers, variant.config)(**(others | common | dict(variant.fields) | fields))
    return _save(getattr(transformers, variant.model)(config), directory, seed=seed)


def make_multimodal(directory: Path) -> Path:
    """A Gemma 3 with a part that sees."""
    import transformers

    text = {**_COMMON, **_GROUPED, **_GEMMA, "layer_types": _SLIDING, "tie_word_embeddings": True}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    return _save(transformers.Gemma3ForConditionalGeneration(config), directory, seed=0)


def _save(model: Any, directory: Path, *, seed: int) -> Path:
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that are not trivially zero and one
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    model.save_pretrained(directory)
    return directory


def reference_logits(directory: Path, prompts: list[list[int]]) -> list[Any]:
    """Hugging Face's logits (T, V) of each prompt by itself, in float32."""
    import torch

    model = _load(directory)
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


def reference_tokens(directory: Path, prompts: list[list[int]], *, max_new_tokens: int) -> list[list[int]]:
    """Hugging Face's greedy continuation of each prompt by itself, in float32, end-of-sequence ignored."""
    return greedy_tokens(_load(directory), prompts, max_new_tokens=max_new_tokens)


def _load(directory: Path) -> Any:
    import torch
    import transformers

    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
