"""How many bytes a benchmark will need on this machine, and whether they are free: looked at before anything is written.

Workers of a benchmark are processes of this machine: stages share its memory and its disk.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from asyncpipe.errors import Invalid
from asyncpipe.free_space import free_disk_bytes, free_memory_bytes
from asyncpipe.policy import Shares
from asyncpipe_coordinator.bench_metrics import Workload
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.partition import LayerRange
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.planner.demand import kv_token_bytes, rounded_up, stage_demand
from asyncpipe_coordinator.planner.stages import DTYPE_BYTES
from asyncpipe_coordinator.tensor_shapes import expected_shapes
from asyncpipe_coordinator.tier_lines import size_text


class Needed(NamedTuple):
    """Bytes of all stages together: those that certainly stay, without working memory."""

    memory: int
    disk: int


def kv_bytes_of_stages(
    model: ModelInfo, workload: Workload, layers: Sequence[LayerRange], *, dtype: str, block_tokens: int
) -> tuple[int, ...]:
    """KV memory that holds all prompts with what is generated for them, and no more.

    As workers count it: in whole blocks, a head's tokens of a block in whole pages, and as if it were not compressed.
    """
    heads, size = model.shape.num_kv_heads, model.shape.head_size
    head_bytes = rounded_up(block_tokens * size * DTYPE_BYTES[dtype], mmap.PAGESIZE)
    num_blocks = workload.num_prompts * -(-(workload.prompt_len + workload.num_generated) // block_tokens)
    return tuple(2 * (last - first) * heads * head_bytes * num_blocks for first, last in layers)


def needed(config: ServiceConfig, model: ModelInfo, workload: Workload, layers: Sequence[LayerRange], *, dtype: str) -> Needed:
    """`config` has a policy for each stage, not budgets."""
    total = Needed(0, 0)
    shapes = expected_shapes(model.path, model.config)
    num_tokens = workload.num_prompts * (workload.prompt_len + workload.num_generated)
    for stage, own in enumerate(layers):
        policy = config.policy_of(stage)
        demand = stage_demand(
            shapes=shapes,
            model=model.shape,
            layers=own,
            dtype_bytes=DTYPE_BYTES[dtype],
            stored_dtype_bytes=DTYPE_BYTES[dtype if config.dummy_weights else model.dtype],
            policy=policy,
            num_micro_batches=config.num_micro_batches or config.num_stages,
            step_tokens=config.step_tokens,
            kv_block_tokens=config.kv_block_tokens,
        )
        weights = demand.weights if policy.moves_weights else demand.resident_weights
        cache = num_tokens * (own.last - own.first) * kv_token_bytes(model.shape, DTYPE_BYTES[dtype], policy)
        on_cpu = not config.device_of(stage).startswith("cuda")
        total = Needed(
            memory=total.memory + _in_memory(weights, policy.weights, on_cpu) + _in_memory(cache, policy.cache, on_cpu),
            # Weights of a checkpoint are read where they are.
            disk=total.disk + _on_disk(weights if config.dummy_weights else 0, policy.weights) + _on_disk(cache, policy.cache),
        )
    return total


def check_space(wanted: Needed, *, name: str, offload_dir: Path | None) -> None:
    """Raises Invalid with what is needed and what is free."""
    directory = offload_dir or Path(tempfile.gettempdir())
    free_bytes = free_disk_bytes(directory)
    if wanted.disk > free_bytes:
        raise Invalid(
            f"{name} needs {size_text(wanted.disk)} on disk, and {size_text(free_bytes)} are free in {directory}: use"
            " --offload-dir on a larger disk, a smaller model, or --compress-weight and --compress-cache"
        )
    memory = free_memory_bytes()
    if memory is not None and wanted.memory > memory:
        raise Invalid(
            f"{name} needs {size_text(wanted.memory)} of memory, and {size_text(memory)} are free: use a --percent with more on"
            " disk, a smaller model, or --compress-weight and --compress-cache"
        )


def _in_memory(num_bytes: int, shares: Shares, on_cpu: bool) -> int:
    """A device that is no GPU is a part of this machine's memory too."""
    return int(num_bytes * (shares.host + (shares.device if on_cpu else 0.0)) / 100)


def _on_disk(num_bytes: int, shares: Shares) -> int:
    return int(num_bytes * shares.disk / 100)
