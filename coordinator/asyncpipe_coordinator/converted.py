"""Checkpoints whose bytes on disk cannot be used as they lie are converted once, and found again at the next start."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncpipe.cache_dir import cache_dir
from asyncpipe.errors import Invalid
from asyncpipe.policy import QUANTIZE_FORMS, Compression
from asyncpipe.tensor_names import MANIFEST
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.convert import WORKER, conversion_arguments, run_worker
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.tensor_files import is_pickled

log = logging.getLogger(__name__)

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")


async def usable_checkpoint(config: ServiceConfig, model: ModelInfo, *, on_progress: Callable[[float], None]) -> Path:
    """The configuration's, or one that is converted from it where stages would have to do the same work at every start: to
    quantize the weights, or to write those that belong on disk anew, because they lie in `.bin` files or are to be compressed.

    `on_progress` hears the share that is done. Raises Invalid, for want of room among others, where weights are on disk.
    """
    if config.dummy_weights or config.simulation is not None:
        return config.checkpoint
    compression = _compression(config)
    if any(policy.weights.disk for policy in config.policies):
        is_needed = compression is not None or is_pickled(config.checkpoint)
        return await _converted(config, model, compression, on_progress) if is_needed else config.checkpoint
    if config.quantize and compression is not None:
        try:
            return await _converted(config, model, compression, on_progress)
        except Invalid as error:
            log.warning("%s; the weights are quantized at every start", error)
    return config.checkpoint


async def _converted(
    config: ServiceConfig, model: ModelInfo, compression: Compression | None, on_progress: Callable[[float], None]
) -> Path:
    """Made now unless it is there."""
    target = _directory(config) / f"{config.checkpoint.name}-{_key(config.checkpoint, compression)}"
    if (target / MANIFEST).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Invalid(f"cannot make {target.parent}: {error.strerror or error}; use another --offload-dir") from None
    log.info("converting %s once, to %s", config.checkpoint, target)
    argv = [sys.executable, "-m", WORKER, *conversion_arguments(model, target, compression)]
    total = 0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal total
        if event["event"] == "begin":
            total = event["bytes"]
        elif event["event"] == "progress":
            on_progress(event["bytes"] / max(total, 1))

    try:
        await run_worker(argv, on_event)
    except Invalid:
        if not (target / MANIFEST).is_file():  # another process may have been first
            raise
    return target


def _compression(config: ServiceConfig) -> Compression | None:
    """How all stages want the weights packed, if they want the same and the checkpoint is not packed already."""
    if (config.checkpoint / MANIFEST).is_file():
        return None
    if config.quantize:
        return QUANTIZE_FORMS[config.quantize]
    wanted = {policy.comp_weight_config if policy.compress_weight else None for policy in config.policies}
    return wanted.pop() if len(wanted) == 1 else None


def _directory(config: ServiceConfig) -> Path:
    """Beside what else is on the disk tier, or with the user's caches."""
    if config.offload_dir is not None:
        return config.offload_dir / "converted"
    return cache_dir() / "converted"


def _key(checkpoint: Path, compression: Compression | None) -> str:
    """Another one when the weights are others, or are to be packed in another way."""
    digest = hashlib.blake2b(f"{checkpoint.resolve()} {compression}".encode(), digest_size=8)
    for path in sorted({path for pattern in WEIGHT_FILES for path in checkpoint.glob(pattern)}):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
