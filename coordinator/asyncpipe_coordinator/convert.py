"""The `convert` command: makes a checkpoint that is quick to load. A worker process does it, for only workers have torch."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from tqdm import tqdm

from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.policy import QUANTIZE_FORMS, Compression
from asyncpipe.process import ChildProcess
from asyncpipe_coordinator.config import DTYPES
from asyncpipe_coordinator.model_files import ModelInfo, inspect_model, resolve_model

WORKER = "asyncpipe_workers.convert"
WORKER_ERROR = f"python -m {WORKER}: error: "
USAGE_EXIT = 2
KILL_AFTER_S = 30.0  # it removes what it has written, which may be much

OnEvent = Callable[[dict[str, Any]], None]


def worker_arguments(arguments: argparse.Namespace) -> list[str]:
    """What the worker process is told. Looks at the model first, and gets it if need be, which takes its time.

    Raises Invalid.
    """
    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise Invalid(f"convert needs {package}, which is not installed: pip install 'asyncpipe-runtime[worker]'")
    if arguments.verify:
        return ["--verify", "--", str(Path(arguments.target or arguments.model).expanduser())]
    if arguments.target is None:
        raise Invalid("TARGET is needed: the directory to make")
    if arguments.dtype not in DTYPES:
        raise Invalid(f"--dtype {arguments.dtype}: use one of {', '.join(DTYPES)}")
    flags = ["--dtype", arguments.dtype, *(["--overwrite"] if arguments.overwrite else [])]
    compression = _compression(arguments)
    model = inspect_model(resolve_model(arguments.model))
    return [*flags, *conversion_arguments(model, Path(arguments.target).expanduser(), compression)]


def conversion_arguments(model: ModelInfo, target: Path, compression: Compression | None) -> list[str]:
    """What the worker process is told of `model`, and of what to make of it."""
    argv = []
    if compression is not None:
        argv += ["--compress-weight", "--num-bits", str(compression.num_bits), "--group-size", str(compression.group_size)]
    if not (model.path / "config.json").is_file():  # a weight directory of FlexLLMGen's
        argv += ["--config", msgspec.json.encode(model.config).decode()]
    return [*argv, "--", str(model.path), str(target)]


def _compression(arguments: argparse.Namespace) -> Compression | None:
    if arguments.quantize is None:
        return Compression(group_size=arguments.group_size) if arguments.compress_weight else None
    if arguments.quantize not in QUANTIZE_FORMS:
        raise Invalid(f"--quantize {arguments.quantize}: use one of {', '.join(QUANTIZE_FORMS)}")
    form = QUANTIZE_FORMS[arguments.quantize]
    if arguments.compress_weight and form.num_bits != Compression().num_bits:
        raise Invalid(f"--compress-weight is 4 bits, --quantize {arguments.quantize} is {form.num_bits}: give one of them")
    return Compression(form.num_bits, arguments.group_size)


async def convert(arguments: argparse.Namespace, worker_argv: Sequence[str]) -> int:
    """Run the worker to its end; returns the exit status. Raises Invalid for what it found wrong."""
    start_s = time.monotonic()
    with _Progress(quiet=arguments.quiet, what="verify" if arguments.verify else "convert") as progress:
        await run_worker([sys.executable, "-m", WORKER, *worker_argv], progress.on_event)
    result = progress.result | {"seconds": round(time.monotonic() - start_s, 4)}
    if arguments.json:
        print(msgspec.json.encode(result).decode())
    elif not arguments.quiet:
        print(_verified_line(result) if arguments.verify else _converted_line(result), file=sys.stderr)
    return 0


class _Progress:
    """A bar of bytes; keeps the worker's last event."""

    def __init__(self, *, quiet: bool, what: str) -> None:
        self.result: dict[str, Any] = {}
        self._bar = tqdm(
            total=0,
            desc=what,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=quiet or None,
            leave=False,
            file=sys.stderr,
        )

    def on_event(self, event: dict[str, Any]) -> None:
        match event.pop("event"):
            case "begin":
                self._bar.reset(total=event["bytes"])
            case "progress":
                self._bar.update(event["bytes"] - self._bar.n)
            case "end":
                self.result = event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._bar.close()


def _converted_line(result: dict[str, Any]) -> str:
    quantization = result["quantization"]
    form = result["dtype"]
    if quantization is not None:
        groups = f" in groups of {quantization['group_size']}" if quantization["num_bits"] == Compression().num_bits else ""
        form = f"{form}, matrices in {quantization['num_bits']} bits{groups}"
    what = f"{result['tensors']} tensors, {result['bytes'] / 2**20:.1f} MiB ({form})"
    if result["is_done_before"]:
        return f"{result['target']} is a finished conversion of {result['source']} already: {what}"
    return f"{result['target']}: {what} in {result['seconds']:.1f} s"


def _verified_line(result: dict[str, Any]) -> str:
    files = f"all {result['files']} files, {result['bytes'] / 2**20:.1f} MiB"
    return f"{result['target']}: {files}, are as they were written ({result['seconds']:.1f} s)"


async def run_worker(argv: Sequence[str], on_event: OnEvent) -> None:
    """Run `argv` and hear its events, one JSON object a line. No deadline: it reports, and whoever watches may cancel.

    Raises Invalid for what it found wrong, AsyncPipeError when it failed. However this ends, it has ended too.
    """
    process = await ChildProcess.spawn(argv, name="the conversion", stdout=asyncio.subprocess.PIPE)
    try:
        await _follow(process.output, on_event)
        returncode = await process.wait()
    finally:
        await process.stop(kill_after_s=KILL_AFTER_S)
    last_lines = process.stderr_tail()
    if returncode == USAGE_EXIT:
        raise Invalid(last_lines[-1].removeprefix(WORKER_ERROR) if last_lines else "the conversion failed without a word")
    if returncode:
        raise AsyncPipeError("\n  ".join([f"{process.name} {process.describe_exit()}; its last lines:", *last_lines]))


async def _follow(stdout: asyncio.StreamReader, on_event: OnEvent) -> None:
    async for line in stdout:
        with contextlib.suppress(msgspec.DecodeError):
            on_event(msgspec.json.decode(line, type=dict[str, Any]))
