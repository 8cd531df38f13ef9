"""Makes a checkpoint that is quick to load, and to read in place: `python -m asyncpipe_workers.convert SOURCE TARGET`.

The target is a Hugging Face safetensors checkpoint with a file for each layer, its tensors in the order in which they are used,
and a manifest with checksums, written last. It appears whole or not at all. Standard output is a JSON object a line: what is
going to be done, how far it is, and what was done.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import msgspec

from asyncpipe.errors import Invalid
from asyncpipe.policy import Compression
from asyncpipe.process import die_with_parent
from asyncpipe.tensor_names import MANIFEST
from asyncpipe_workers.checkpoint import Checkpoint, read_config
from asyncpipe_workers.checkpoint_files import reading
from asyncpipe_workers.convert_files import HashedFile, cast, convert_in_chunks, write_file
from asyncpipe_workers.convert_plan import FLOAT_DTYPES, Plan, PlannedFile, PlannedTensor, make_plan
from asyncpipe_workers.convert_target import (
    check_space,
    check_target,
    commit,
    no_space,
    partial_directory,
    remove_leftovers,
)
from asyncpipe_workers.manifest import Manifest, ManifestFile, check_checksums, check_sizes, load_manifest
from asyncpipe_workers.memory.quantization import Codec, make_codec

PROGRAM = "python -m asyncpipe_workers.convert"
EXIT_USAGE = 2
SIGNAL_EXIT = 128  # a shell's convention: 130 for SIGINT, 143 for SIGTERM
STDOUT = 1
WAKE_S = 0.5  # to look for signals
INDEX = "model.safetensors.index.json"
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # tokenizers, chat templates, generation_config.json
NOT_COPIED = ("config.json", "*.index.json", MANIFEST)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Report = Callable[[dict[str, Any]], None]


class Job(NamedTuple):
    """`dtype` may be "auto". Paths are absolute, without links. `config` is for a source without a config.json."""

    source: Path
    target: Path
    dtype: str = "auto"
    compression: Compression | None = None
    overwrite: bool = False
    config: dict[str, Any] | None = None


class Stopped(BaseException):
    """A signal asks for an end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def convert(job: Job, report: Report) -> None:
    """Raises Invalid, and leaves nothing behind then."""
    remove_leftovers(job.target)
    config = job.config or read_config(job.source)
    with Checkpoint(job.source) as checkpoint:
        plan = make_plan(checkpoint, config, dtype=job.dtype, compression=job.compression)
        manifest = Manifest(
            source=str(job.source),
            source_fingerprint=_fingerprint(checkpoint, config),
            dtype=plan.dtype,
            quantization=plan.compression,
            files=(),
        )
        is_done = not job.overwrite and _is_finished(job.target, manifest)
        if not is_done:
            check_target(job.target, source=job.source, overwrite=job.overwrite)
            num_bytes = plan.num_bytes + sum(path.stat().st_size for path in _files_to_copy(job.source))
            check_space(job.target, num_bytes)
            with _write_errors(job.target, num_bytes), partial_directory(job.target) as partial:
                _write(partial, checkpoint, config, plan, manifest, report)
                commit(partial, job.target, overwrite=job.overwrite)
    report(
        {
            "event": "end",
            "source": str(job.source),
            "target": str(job.target),
            "is_done_before": is_done,
            "tensors": plan.num_tensors,
            "bytes": plan.num_bytes,
            "dtype": plan.dtype,
            "quantization": None if plan.compression is None else msgspec.to_builtins(plan.compression),
        }
    )


def verify(target: Path, report: Report) -> None:
    """Read all of a converted directory. Raises Invalid that names the first bad file."""
    manifest = load_manifest(target)
    if manifest is None:
        raise Invalid(f"{target} is not a converted checkpoint: it has no {MANIFEST}")
    num_bytes = sum(entry.num_bytes for entry in manifest.files)
    report({"event": "begin", "files": len(manifest.files), "bytes": num_bytes})
    check_checksums(target, manifest, on_read=_Progress(report).add)
    report({"event": "end", "target": str(target), "files": len(manifest.files), "bytes": num_bytes})


class _Progress:
    """Tells how many bytes are done."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._report({"event": "progress", "bytes": self._num_bytes})


def _write(
    partial: Path, checkpoint: Checkpoint, config: dict[str, Any], plan: Plan, manifest: Manifest, report: Report
) -> None:
    report({"event": "begin", "tensors": plan.num_tensors, "bytes": plan.num_bytes})
    progress = _Progress(report)
    codec = None if plan.compression is None else make_codec(plan.compression)
    entries = [_write_tensors(partial, checkpoint, file, codec, progress) for file in plan.files]
    entries.append(write_file(partial / INDEX, _index(plan)))
    write_file(partial / "config.json", _config_with_dtype(config, plan.dtype))
    for path in _files_to_copy(checkpoint.path):
        with reading(path) as stream:
            write_file(partial / path.name, stream.read())
    write_file(partial / MANIFEST, msgspec.json.format(msgspec.json.encode(_with_files(manifest, entries)), indent=2))


def _with_files(manifest: Manifest, files: Sequence[ManifestFile]) -> Manifest:
    changed: Manifest = msgspec.structs.replace(manifest, files=tuple(files))
    return changed


def _write_tensors(
    partial: Path, checkpoint: Checkpoint, planned: PlannedFile, codec: Codec | None, progress: _Progress
) -> ManifestFile:
    with HashedFile(partial / planned.name) as file:
        file.write(planned.header)
        progress.add(len(planned.header))
        for tensor in planned.tensors:
            for data in _converted(checkpoint, tensor, codec):
                file.write(data)
                progress.add(len(data))
    return file.entry


def _converted(checkpoint: Checkpoint, planned: PlannedTensor, codec: Codec | None) -> Iterator[memoryview]:
    tensor = checkpoint.read(planned.source_name, planned.source_shape).detach()
    change = codec.encode if planned.is_compressed and codec is not None else functools.partial(cast, dtype=planned.dtype)
    try:
        yield from convert_in_chunks(tensor, change)
    except Invalid as error:
        raise Invalid(f"{checkpoint.path}: tensor {planned.source_name} cannot be converted: {error}") from None


def _index(plan: Plan) -> bytes:
    weight_map = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    num_bytes = sum(tensor.num_bytes for file in plan.files for tensor in file.tensors)
    return _json({"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))})


def _config_with_dtype(config: dict[str, Any], dtype: str) -> bytes:
    """Under the name that the configuration uses for it: newer ones say `dtype`, older ones `torch_dtype`."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    return _json(config | dict.fromkeys(names, dtype))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _files_to_copy(source: Path) -> list[Path]:
    found = {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(path.match(pattern) for pattern in NOT_COPIED))


def _fingerprint(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    digest = hashlib.blake2b(_json(config), digest_size=16)
    for name in sorted(checkpoint.files()):
        status = (checkpoint.path / name).stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _is_finished(target: Path, wanted: Manifest) -> bool:
    with contextlib.suppress(Invalid):
        found = load_manifest(target)
        if found is not None and _with_files(found, ()) == wanted:
            check_sizes(target, found)
            return True
    return False


@contextlib.contextmanager
def _write_errors(target: Path, num_bytes: int) -> Iterator[None]:
    """The operating system's refusals, as one clear line; it is made when the partial directory is gone."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise no_space(target, num_bytes) from None
        raise Invalid(f"cannot write {target}: {error.strerror or error}") from None


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises Stopped; while that cleans up, the others are ignored."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Convert a checkpoint to one that is quick to load.")
    parser.add_argument("source", metavar="SOURCE", help="a Hugging Face directory, or FlexLLMGen's weights with a config.json")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="the directory to make")
    parser.add_argument("--dtype", default="auto", choices=["auto", *FLOAT_DTYPES], help="auto: as it is stored")
    parser.add_argument("--compress-weight", action="store_true", help="store matrices in few bits")
    parser.add_argument("--num-bits", type=int, default=4, choices=[4, 8], help="how few (default: 4)")
    parser.add_argument("--group-size", type=int, default=64, help="numbers that share a scale (default: 64)")
    parser.add_argument("--verify", action="store_true", help="only check all checksums of TARGET (or SOURCE without one)")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET")
    parser.add_argument("--config", type=json.loads, metavar="JSON", help="for a SOURCE that has no config.json")
    return parser


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Raises Invalid."""
    if arguments.verify:
        verify(Path(arguments.target or arguments.source).resolve(), report)
        return
    if arguments.target is None:
        raise Invalid("TARGET, the directory to make, is needed")
    job = Job(
        source=Path(arguments.source).resolve(),
        target=Path(arguments.target).resolve(),
        dtype=arguments.dtype,
        compression=Compression(arguments.num_bits, arguments.group_size) if arguments.compress_weight else None,
        overwrite=arguments.overwrite,
        config=arguments.config,
    )
    convert(job, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for a user's mistake or a full disk, 128 and the number for a signal."""
    die_with_parent()
    try:
        with _stopped_by_signals():
            run(build_parser().parse_args(argv), _print)
    except Invalid as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Stopped as stopped:
        return SIGNAL_EXIT + stopped.number
    return 0


def _print(event: dict[str, Any]) -> None:
    """Waits for a reader that is slow, but not within the write: a signal that another thread took would not end that."""
    with contextlib.suppress(BrokenPipeError):  # nobody listens; the work goes on
        while not select.select([], [STDOUT], [], WAKE_S)[1]:
            pass
        os.write(STDOUT, msgspec.json.encode(event) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
