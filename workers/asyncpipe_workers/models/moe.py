"""Mixtral (Jiang et al. 2024, "Mixtral of Experts") and Qwen 3 MoE (Yang et al. 2025): feed-forward parts of many experts, of
which a router chooses a few for each row.

Shapes: T rows of a step, D hidden, X experts, N chosen for each row, C rows of one expert.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from asyncpipe.model_shape import is_sparse, num_experts
from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models import decoder
from asyncpipe_workers.models.decoder import DecoderConfig, GatedFeedForward, Residual, sliding_windows
from asyncpipe_workers.models.expert_calls import ExpertCalls
from asyncpipe_workers.models.row_kernels import row_kernel
from asyncpipe_workers.models.units import Blocks
from asyncpipe_workers.models.weights import Linear, Rows, Weights
from asyncpipe_workers.tape import new_tensor


class ExpertNames(NamedTuple):
    """Of the part within a layer, and of an expert's matrices."""

    part: str
    gate: str
    up: str
    down: str


MIXTRAL_NAMES = ExpertNames("block_sparse_moe", "w1", "w3", "w2")
QWEN_NAMES = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig(DecoderConfig):
    """`sparse` says which layers have experts. With `sums_to_one` the chosen experts' weights are divided by their sum."""

    num_experts: int
    num_chosen: int
    expert_size: int
    sparse: tuple[bool, ...]
    sums_to_one: bool
    names: ExpertNames


def mixtral_config(fields: Mapping[str, Any]) -> MoEConfig:
    return _config(
        fields,
        is_sliding=True,
        expert_size=fields["intermediate_size"],
        sums_to_one=True,
        names=MIXTRAL_NAMES,
    )


def qwen3_moe_config(fields: Mapping[str, Any]) -> MoEConfig:
    has_bias = bool(fields.get("attention_bias", False))
    return _config(
        fields,
        is_sliding=bool(fields.get("use_sliding_window", False)),
        expert_size=fields["moe_intermediate_size"],
        sums_to_one=bool(fields.get("norm_topk_prob", False)),
        names=QWEN_NAMES,
        has_head_norms=True,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
    )


def _config(fields: Mapping[str, Any], *, is_sliding: bool, **own: Any) -> MoEConfig:
    num_layers = fields["num_hidden_layers"]
    return MoEConfig.from_fields(
        fields,
        windows=sliding_windows(fields, [is_sliding] * num_layers),
        num_experts=num_experts(fields),
        num_chosen=fields["num_experts_per_tok"],
        sparse=tuple(is_sparse(fields, layer) for layer in range(num_layers)),
        **own,
    )


class Choices(NamedTuple):
    """Of each row, its experts and their shares of its result."""

    chosen_TN: torch.Tensor  # int64
    shares_TN: torch.Tensor


class Experts:
    """Hidden states (T, D), normed, to what is added to them. An expert is computed only for rows that have chosen it."""

    def __init__(self, weights: Weights, config: MoEConfig, index: int) -> None:
        name, names, size = f"layers.{index}.{config.names.part}", config.names, config.expert_size
        self._hidden_size = config.hidden_size
        self._num_chosen = config.num_chosen
        self._sums_to_one = config.sums_to_one
        self.router = weights.linear([Rows(f"{name}.gate", config.num_experts)], config.hidden_size, bias=False)
        self.experts = []
        for expert in range(config.num_experts):
            prefix = f"{name}.experts.{expert}"
            gate_up = [Rows(f"{prefix}.{names.gate}", size), Rows(f"{prefix}.{names.up}", size)]
            self.experts.append(GatedFeedForward(weights, config, gate_up, f"{prefix}.{names.down}", size=size))

    def __call__(self, x_TD: torch.Tensor, layout: StepLayout, cache: KVCache) -> torch.Tensor:
        scores_TX = self.router(x_TD).contiguous()
        num_rows, num_experts = scores_TX.shape
        choose = row_kernel("ChooseExperts", scores_TX, 0, num_experts, self._num_chosen, self._sums_to_one)
        if choose is None:
            return self._by_expert(x_TD, self._chosen_by_torch(scores_TX))
        choices = Choices(new_tensor(num_rows, self._num_chosen, dtype=torch.int64), new_tensor(num_rows, self._num_chosen))
        choose((scores_TX, *choices), (num_rows,))
        calls = self._calls  # made by the first step of all, which is on no tape
        if calls is not None and choices.chosen_TN.numel() <= num_experts:  # few rows have an expert in common
            return calls(x_TD, *choices)
        return self._by_expert(x_TD, choices)

    def _chosen_by_torch(self, scores_TX: torch.Tensor) -> Choices:
        shares_TN, chosen_TN = torch.softmax(scores_TX.float(), dim=-1).topk(self._num_chosen, dim=-1)
        if self._sums_to_one:
            shares_TN = shares_TN / shares_TN.sum(dim=-1, keepdim=True)
        return Choices(chosen_TN, shares_TN)

    def _by_expert(self, x_TD: torch.Tensor, choices: Choices) -> torch.Tensor:
        chosen, shares = choices.chosen_TN.flatten(), choices.shares_TN.flatten().to(x_TD.dtype)
        by_expert = chosen.argsort(stable=True)  # numbers of pairs of a row and a choice
        counts_X = chosen.bincount(minlength=len(self.experts)).tolist()
        out_TD, first = torch.zeros_like(x_TD), 0
        for expert, count in zip(self.experts, counts_X, strict=True):
            if count:
                pairs_C = by_expert[first : first + count]
                rows_C = pairs_C // self._num_chosen
                out_TD.index_add_(0, rows_C, expert.apply(x_TD[rows_C]).mul_(shares[pairs_C, None]))
                first += count
        return out_TD

    @functools.cached_property
    def _calls(self) -> ExpertCalls | None:
        """None where experts call anything else than compiled kernels, as they do where weights come and go."""
        if isinstance(self.experts[0].down, Linear):
            return None
        with contextlib.suppress(NotImplementedError):
            return ExpertCalls([expert.apply for expert in self.experts], self._hidden_size)
        return None


def _feed_forward(weights: Weights, config: MoEConfig, index: int) -> Residual:
    part = Experts(weights, config, index) if config.sparse[index] else decoder.dense_part(weights, config, index)
    return Residual(part, config.norm(weights, f"layers.{index}.post_attention_layernorm"))


def moe_blocks(config: MoEConfig) -> Blocks:
    return decoder.decoder_blocks(config, feed_forward=_feed_forward)
