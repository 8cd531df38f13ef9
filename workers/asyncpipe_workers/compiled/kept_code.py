"""Machine code that was compiled before, on this machine, from the same instructions: to compile takes a hundred times as long
as to read it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import llvmlite
from llvmlite import binding as llvm

from asyncpipe.cache_dir import cache_dir

FOLDER = "compiled"
MAX_FILES = 512  # the oldest go first
DIGEST_BYTES = hashlib.sha256().digest_size


def kept_code(what: str, compile_it: Callable[[], bytes]) -> bytes:
    """What `compile_it` gives, or has given before for the same `what`. A file that is not whole is compiled again; where none
    can be written, so does the next start."""
    path = cache_dir() / FOLDER / hashlib.sha256(f"{what}\n{_origin()}".encode()).hexdigest()
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if hashlib.sha256(kept[DIGEST_BYTES:]).digest() == kept[:DIGEST_BYTES]:
            return kept[DIGEST_BYTES:]
    code = compile_it()
    with contextlib.suppress(OSError):
        _keep(path, hashlib.sha256(code).digest() + code)
    return code


@functools.cache
def _origin() -> str:
    """Compiler, processor, and what writes the instructions: what was compiled with others is of no use."""
    digest = hashlib.sha256(llvm.get_host_cpu_features().flatten().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"{llvm.get_host_cpu_name()} {llvmlite.__version__} {llvm.llvm_version_info} {digest.hexdigest()}"


def _keep(path: Path, kept: bytes) -> None:
    """For this user alone, who will execute it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(kept)
    partial.replace(path)
    by_age = sorted(path.parent.iterdir(), key=lambda each: each.stat().st_mtime)
    for old in by_age[:-MAX_FILES]:
        old.unlink()
