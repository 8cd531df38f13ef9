"""OPT in a straight line, one prompt at a time: compressed weights, compressed caches and sparse attention spelled out.

Shapes: T tokens of a step, C all tokens so far, H heads, K head size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from asyncpipe_workers.memory.quantization import GroupCodec


class OPTOracle:
    """A pre-norm OPT. `weight_codec` and `cache_codec` pack to 4 bits and back; `sparsity` is the share of values kept."""

    def __init__(
        self,
        path: Path,
        *,
        weight_codec: GroupCodec | None = None,
        cache_codec: GroupCodec | None = None,
        sparsity: float = 1.0,
    ) -> None:
        self.config = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        self.weights = {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}
        if weight_codec is not None:
            for name, tensor in self.weights.items():
                if tensor.ndim > 1 and "embed" not in name:  # matrices of the layers
                    self.weights[name] = there_and_back(tensor, weight_codec)
        self.cache_codec = cache_codec
        self.sparsity = sparsity

    def generate(self, prompt: list[int], count: int) -> list[int]:
        past: list[tuple[torch.Tensor, torch.Tensor]] = [
            (torch.empty(0, self.heads, self.head_size),) * 2 for _ in range(self.config["num_hidden_layers"])
        ]
        tokens, new = [], prompt
        for _ in range(count):
            start = len(past[0][0])
            hidden = self("embed_tokens.weight")[torch.tensor(new)]
            hidden = hidden + self("embed_positions.weight")[torch.arange(start, start + len(new)) + 2]
            for layer in range(len(past)):
                hidden, past[layer] = self.layer(hidden, layer, past[layer])
            logits = F.linear(self.norm(hidden[-1:], "final_layer_norm"), self("embed_tokens.weight"))
            tokens.append(int(logits[0].argmax()))
            new = [tokens[-1]]
        return tokens

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def head_size(self) -> int:
        return int(self.config["hidden_size"]) // self.heads

    def __call__(self, name: str) -> torch.Tensor:
        return self.weights[f"decoder.{name}"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self(f"{name}.weight"), self(f"{name}.bias"))

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self(f"{name}.weight"), self(f"{name}.bias"))

    def layer(
        self, hidden: torch.Tensor, layer: int, past: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        name = f"layers.{layer}"
        x = self.norm(hidden, f"{name}.self_attn_layer_norm")
        q, k, v = (self.linear(x, f"{name}.self_attn.{n}_proj").view(len(x), self.heads, self.head_size) for n in "qkv")
        keys, values = (torch.cat([self.packed(old), new]) for old, new in zip(past, (k, v), strict=True))
        attended = self.attend(q, keys, values).reshape(len(x), -1)
        hidden = hidden + self.linear(attended, f"{name}.self_attn.out_proj")
        x = self.norm(hidden, f"{name}.final_layer_norm")
        hidden = hidden + self.linear(F.relu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")
        return hidden, (torch.cat([past[0], k]), torch.cat([past[1], v]))

    def packed(self, past: torch.Tensor) -> torch.Tensor:
        return past if self.cache_codec is None else there_and_back(past, self.cache_codec)

    def attend(self, q_THK: torch.Tensor, k_CHK: torch.Tensor, v_CHK: torch.Tensor) -> torch.Tensor:
        scores_HTC = torch.einsum("thk,chk->htc", q_THK, k_CHK) / self.head_size**0.5
        num, total = len(q_THK), len(k_CHK)
        visible = torch.ones(num, total, dtype=torch.bool).tril(total - num)
        weights_HTC = scores_HTC.masked_fill(~visible, -torch.inf).softmax(-1)
        if self.sparsity < 1.0 and num == 1 and total > 1:  # decoding: the largest weights of the past, and the newest token
            past = weights_HTC[..., :-1]
            kept = past.topk(int(self.sparsity * (total - 1)), dim=-1).indices
            weights_HTC[..., :-1] = torch.zeros_like(past).scatter(-1, kept, past.gather(-1, kept))
        return torch.einsum("htc,chk->thk", weights_HTC, v_CHK)


def there_and_back(x: torch.Tensor, codec: GroupCodec) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.shape[-1], dtype=torch.float32)
