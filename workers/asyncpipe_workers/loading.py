"""From a plan to what computes it: layers of a checkpoint, or a simulation."""

from __future__ import annotations

from pathlib import Path

import msgspec

from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.model_place import find_checkpoint
from asyncpipe.simulation import Simulation, is_simulation
from asyncpipe.wire.messages import LoadStage
from asyncpipe_workers.affinity import keep_to_cpus
from asyncpipe_workers.c_runtime import keep_freed_memory
from asyncpipe_workers.sim import SimulatedStage
from asyncpipe_workers.stage_compute import StageCompute


def load_stage_compute(plan: LoadStage, *, device: str, model: str | None = None) -> StageCompute:
    """On `device`, unless the plan names another, from the directory `model`, unless it is None.

    Raises Invalid for a bad checkpoint, a device that is not there, or too little memory.
    """
    device = plan.device or device
    if is_simulation(device):
        return SimulatedStage(Simulation.parse(device), plan)
    keep_to_cpus(plan.cpus)
    if not plan.dummy_weights:
        checkpoint = Path(model) if model is not None else find_checkpoint(plan.checkpoint, plan.model)
        plan = msgspec.structs.replace(plan, checkpoint=str(checkpoint))
    return _load_model(plan, device=device)


def _load_model(plan: LoadStage, *, device: str) -> StageCompute:
    import torch

    from asyncpipe_workers.stage_model import StageModel

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Invalid(f"--device {device}: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    if not plan.policy.moves_weights:  # whoever streams them counts every byte
        keep_freed_memory()
    if plan.num_threads:
        torch.set_num_threads(plan.num_threads)
    try:
        return StageModel.load(plan, device=device)
    except (AsyncPipeError, MemoryError):
        raise
    except OSError as error:
        raise Invalid(f"cannot read the checkpoint {plan.checkpoint}: {error}") from error
