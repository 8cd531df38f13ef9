"""From a plan to what computes it: layers of a checkpoint, or a simulation."""

from __future__ import annotations

from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.simulation import Simulation, is_simulation
from asyncpipe.wire.messages import LoadStage
from asyncpipe_workers.sim import SimulatedStage
from asyncpipe_workers.stage import StageCompute


def load_stage_compute(plan: LoadStage, *, device: str) -> StageCompute:
    """Raises Invalid for a bad checkpoint, a device that is not there, or too little memory."""
    if is_simulation(device):
        return SimulatedStage(Simulation.parse(device), plan)
    return _load_model(plan, device=device)


def _load_model(plan: LoadStage, *, device: str) -> StageCompute:
    import torch

    from asyncpipe_workers.stage_model import StageModel

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Invalid(f"--device {device}: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    if plan.num_threads:
        torch.set_num_threads(plan.num_threads)
    try:
        return StageModel.load(plan, device=device)
    except (AsyncPipeError, MemoryError):
        raise
    except OSError as error:
        raise Invalid(f"cannot read the checkpoint {plan.checkpoint}: {error}") from error
