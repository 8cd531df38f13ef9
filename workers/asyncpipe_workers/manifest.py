"""asyncpipe.json: what a converted checkpoint is, and what its files must be. It is the last file that a conversion writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from asyncpipe.errors import Invalid
from asyncpipe.policy import Compression
from asyncpipe.tensor_names import MANIFEST
from asyncpipe_workers.checkpoint_files import reading

FORMAT_VERSION = 1

_READ_BYTES = 4 << 20


class ManifestFile(msgspec.Struct, frozen=True):
    """`checksum` is that of `new_checksum`, in hex."""

    name: str
    num_bytes: int
    checksum: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`files` are those that the conversion made, not those that it copied, which may be edited.

    `source_fingerprint` changes when the source's weights do.
    """

    format_version: int = FORMAT_VERSION
    source: str
    source_fingerprint: str
    dtype: str
    quantization: Compression | None
    files: tuple[ManifestFile, ...]


def new_checksum() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def load_manifest(path: Path) -> Manifest | None:
    """None for a directory without one. Raises Invalid for one that cannot be understood."""
    file = path / MANIFEST
    if not file.exists():
        return None
    with reading(file) as stream:
        data = stream.read()
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except ValueError as error:
        raise Invalid(f"{file} is damaged ({error}); convert again") from None
    if manifest.format_version != FORMAT_VERSION:
        raise Invalid(f"{file} has version {manifest.format_version}; this program reads {FORMAT_VERSION}; convert again")
    if any(Path(entry.name).name != entry.name for entry in manifest.files):
        raise Invalid(f"{file} is damaged: it names files of other directories; convert again")
    return manifest


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Raises Invalid unless every file is there with its size."""
    for entry in manifest.files:
        file = path / entry.name
        if not file.is_file() or file.stat().st_size != entry.num_bytes:
            raise Invalid(f"{path} was converted, but file {entry.name} is missing or cut short; convert again")


def check_checksums(path: Path, manifest: Manifest, *, on_read: Callable[[int], None] = lambda _: None) -> None:
    """Read every file; `on_read` is told how many bytes more. Raises Invalid that names the first one that has changed."""
    check_sizes(path, manifest)
    for entry in manifest.files:
        checksum = new_checksum()
        with reading(path / entry.name) as stream:
            while chunk := stream.read(_READ_BYTES):
                checksum.update(chunk)
                on_read(len(chunk))
        if checksum.hexdigest() != entry.checksum:
            raise Invalid(f"{path / entry.name} is damaged: its checksum is not that of the manifest; convert again")
