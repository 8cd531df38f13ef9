"""Checkpoints whose bytes on disk cannot be used as they lie are converted once, and found again at the next start."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from asyncpipe.cache_dir import cache_dir
from asyncpipe.errors import Invalid
from asyncpipe.policy import QUANTIZE_FORMS, Compression
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.convert import WORKER, run_worker
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.tensor_files import MANIFEST, is_pickled

log = logging.getLogger(__name__)

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")


def needs_conversion(config: ServiceConfig) -> bool:
    """Whether stages would have to do the same work at every start: to quantize the weights, or to write those that belong on
    disk anew, because they lie in `.bin` files or are to be compressed."""
    if config.dummy_weights or config.simulation is not None:
        return False
    on_disk = any(policy.weights.disk for policy in config.policies)
    return (on_disk and is_pickled(config.checkpoint)) or (
        (on_disk or bool(config.quantize)) and _compression(config) is not None
    )


async def converted(config: ServiceConfig, model: ModelInfo, *, on_progress: Callable[[float], None]) -> Path:
    """The checkpoint that `convert` makes of the configuration's, made now unless it is there; `on_progress` hears the share
    that is done. Raises Invalid, for want of room among others."""
    compression = _compression(config)
    target = _directory(config) / f"{config.checkpoint.name}-{_key(config.checkpoint, compression)}"
    if (target / MANIFEST).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Invalid(f"cannot make {target.parent}: {error.strerror or error}; use another --offload-dir") from None
    log.info("converting %s once, to %s", config.checkpoint, target)
    argv = [sys.executable, "-m", WORKER]
    if compression is not None:
        argv += ["--compress-weight", "--num-bits", str(compression.num_bits), "--group-size", str(compression.group_size)]
    if not (config.checkpoint / "config.json").is_file():
        argv += ["--config", msgspec.json.encode(model.config).decode()]
    total = 0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal total
        if event["event"] == "begin":
            total = event["bytes"]
        elif event["event"] == "progress":
            on_progress(event["bytes"] / max(total, 1))

    try:
        await run_worker([*argv, "--", str(config.checkpoint), str(target)], on_event)
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
