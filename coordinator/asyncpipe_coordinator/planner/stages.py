"""Budgets of a service, turned into a policy for each of its stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from asyncpipe.errors import Invalid
from asyncpipe.policy import Policy
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.partition import LayerRange
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.planner.demand import StageDemand, stage_demand
from asyncpipe_coordinator.planner.derive import Budget, derive_policy
from asyncpipe_coordinator.tensor_shapes import expected_shapes
from asyncpipe_coordinator.tier_lines import policy_text, size_text

log = logging.getLogger(__name__)

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def with_derived_policies(
    config: ServiceConfig, model: ModelInfo, *, layers: Sequence[LayerRange], dtype: str
) -> ServiceConfig:
    """`config` with a policy and KV memory for each stage in place of budgets; without budgets, as it is.

    Raises Invalid for a budget that is too small, naming the stage.
    """
    if config.device_memory is None:
        return config
    derived = _derived(config, model, layers, dtype, step_tokens=config.step_tokens)
    if derived.step_tokens > config.step_tokens:  # as weights are moved; more tokens a step need more memory
        derived = _derived(config, model, layers, dtype, step_tokens=derived.step_tokens)
    for stage in range(config.num_stages):
        kv_text = size_text(derived.kv_bytes_of(stage) or 0)
        log.info("stage %d: policy by its budget: %s; %s of KV memory", stage, policy_text(derived.policy_of(stage)), kv_text)
    return derived


def _derived(
    config: ServiceConfig, model: ModelInfo, layers: Sequence[LayerRange], dtype: str, *, step_tokens: int
) -> ServiceConfig:
    shapes = expected_shapes(model.path, model.config)
    if not shapes:
        raise Invalid(f"--device-memory: the tensors of a {model.architecture} are not known beforehand; use --percent")
    demands = [
        stage_demand(
            shapes=shapes,
            model=model.shape,
            layers=own,
            dtype_bytes=DTYPE_BYTES[dtype],
            stored_dtype_bytes=DTYPE_BYTES[dtype if config.dummy_weights else model.dtype],
            policy=config.policy_of(stage),
            num_micro_batches=config.num_micro_batches or config.num_stages,
            step_tokens=step_tokens,
            kv_block_tokens=config.kv_block_tokens,
            kv_bytes=config.kv_bytes_of(stage),
        )
        for stage, own in enumerate(layers)
    ]
    return replace(
        config,
        policy=tuple(_policy(config, stage, demand) for stage, demand in enumerate(demands)),
        device_memory=None,
        host_memory=None,
        kv_bytes=tuple(demand.cache for demand in demands),
    )


def _policy(config: ServiceConfig, stage: int, demand: StageDemand) -> Policy:
    budget = Budget(device=config.device_memory or 0, host=config.host_memory)
    try:
        return derive_policy(demand=demand, budget=budget, base=config.policy_of(stage))
    except Invalid as error:
        raise Invalid(f"stage {stage}: {error}") from None
