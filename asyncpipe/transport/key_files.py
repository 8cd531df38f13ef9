"""A directory of CURVE keys, in the certificate format of pyzmq's `zmq.auth`.

    DIR/coordinator.key        DIR/coordinator.key_secret
    DIR/workers/NAME.key       DIR/workers/NAME.key_secret
    DIR/clients/NAME.key       DIR/clients/NAME.key_secret

A `.key` is public: the coordinator lets in whoever's is in its `workers` and `clients`, and all others need its own. A
`.key_secret` holds both halves and belongs on one machine, readable by one user.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zmq.auth import create_certificates, load_certificate

from asyncpipe.errors import Invalid
from asyncpipe.transport.key_pair import KeyPair, check_public_key

COORDINATOR = "coordinator"
FOLDERS = {"worker": "workers", "client": "clients"}
DEFAULT_NAME = "default"
NAME_VARIABLE = "ASYNCPIPE_KEY_NAME"
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
PUBLIC_SUFFIX, SECRET_SUFFIX = ".key", ".key_secret"
FOLDER_MODE, PUBLIC_MODE, SECRET_MODE = 0o700, 0o644, 0o600
OTHERS_MODE = 0o077  # what a secret file must not allow to anybody but its owner


class KeyName(NamedTuple):
    """Which key of a directory: the `coordinator`, or a `worker` or `client` by name."""

    role: str
    name: str

    def base(self, directory: Path) -> Path:
        """Its files' path, without a suffix."""
        return directory / FOLDERS[self.role] / self.name if self.role in FOLDERS else directory / COORDINATOR


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """A key that has been made, and where."""

    key: KeyName
    public: str
    public_file: Path
    secret_file: Path


# --- reading ----------------------------------------------------------------------------------------------------------


def read_own_pair(directory: Path, *, role: str, name: str) -> KeyPair:
    """The pair of who runs as `role`: `name` if that is not "", else the only one there, else `default`.

    Raises Invalid, one line, for a file that is missing, unreadable, malformed, or readable by others.
    """
    path = _own_secret_file(directory, role=role, name=name)
    _check_private(path)
    public, secret = _load(path)
    pair = KeyPair.of_secret(secret, source=f"the secret-key in {path}")
    if public != pair.public:
        raise Invalid(f"{path}: its public-key is not that of its secret-key; make a new one with asyncpipe-coordinator keygen")
    return pair


def read_coordinator_key(directory: Path) -> str:
    """The coordinator's public key. Raises Invalid."""
    return _read_public(directory / f"{COORDINATOR}{PUBLIC_SUFFIX}")


def read_allowed(directory: Path) -> dict[str, frozenset[str]]:
    """Whom the coordinator lets in, and as what: public keys and their roles. Raises Invalid."""
    allowed: dict[str, frozenset[str]] = {}
    for role, folder in FOLDERS.items():
        for path in _files(directory / folder, PUBLIC_SUFFIX):
            public = _read_public(path)
            allowed[public] = allowed.get(public, frozenset()) | {role}
    return allowed


def check_directory(directory: Path) -> None:
    """Raises Invalid when it is not there."""
    try:
        is_there = directory.is_dir()
    except OSError as error:
        raise Invalid(f"{directory} cannot be read: {error.strerror}") from None
    if not is_there:
        raise Invalid(f"{directory} is not a directory of keys; make one with asyncpipe-coordinator keygen {directory}")


def _own_secret_file(directory: Path, *, role: str, name: str) -> Path:
    if role not in FOLDERS:
        return directory / f"{COORDINATOR}{SECRET_SUFFIX}"
    folder = directory / FOLDERS[role]
    if name:
        return folder / f"{check_name(name)}{SECRET_SUFFIX}"
    found = {path.name.removesuffix(SECRET_SUFFIX): path for path in _files(folder, SECRET_SUFFIX)}
    if not found:
        raise Invalid(f"{folder} has no NAME{SECRET_SUFFIX}, which a {role} needs")
    if len(found) > 1 and DEFAULT_NAME not in found:
        raise Invalid(f"{folder} has several keys, {', '.join(found)}: name one of them in {NAME_VARIABLE}")
    return found[DEFAULT_NAME] if len(found) > 1 else next(iter(found.values()))


def _files(folder: Path, suffix: str) -> list[Path]:
    """By name; none when there is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(suffix) and not path.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Invalid(f"{folder} cannot be read: {error.strerror}") from None


def _check_private(path: Path) -> None:
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}") from None
    if mode & OTHERS_MODE:
        raise Invalid(f"{path} is a secret key that others may use (mode {mode:03o}): chmod 600 {path}")


def _read_public(path: Path) -> str:
    return check_public_key(_load(path)[0], source=f"the public-key in {path}")


def _load(path: Path) -> tuple[str, str]:
    """The public and the secret key in a file, "" for one that is not in it."""
    try:
        path.open("rb").close()  # for pyzmq gives no reason
        public, secret = load_certificate(path)
        return public.decode("ascii"), (secret or b"").decode("ascii")
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, IndexError):
        raise Invalid(f"{path} is not a key file; make one with asyncpipe-coordinator keygen") from None


# --- making -----------------------------------------------------------------------------------------------------------


def make_keys(directory: Path, wanted: Sequence[KeyName]) -> list[KeyFiles]:
    """Make new keys. Raises Invalid, before anything is written, when one of them is there already."""
    for index, key in enumerate(wanted):
        check_name(key.name)
        _check_absent(key, directory, others=wanted[:index])
    try:
        return [_make_key(key, directory) for key in wanted]
    except OSError as error:
        raise Invalid(f"cannot write {error.filename or directory}: {error.strerror}") from None


def check_name(name: str) -> str:
    """`name` itself, when it may be a key's. Raises Invalid."""
    if not NAME_PATTERN.fullmatch(name):
        raise Invalid(f"{name!r} cannot name a key: use up to 64 letters, digits, dots, dashes and underscores")
    return name


def _check_absent(key: KeyName, directory: Path, *, others: Sequence[KeyName]) -> None:
    for path in (_with_suffix(key.base(directory), suffix) for suffix in (PUBLIC_SUFFIX, SECRET_SUFFIX)):
        if os.path.lexists(path):
            raise Invalid(f"{path} exists already, and keys are never overwritten; remove it first, or choose another name")
    if key in others:
        raise Invalid(f"{key.role} {key.name} was named twice")


def _make_key(key: KeyName, directory: Path) -> KeyFiles:
    """In a folder that nobody else can enter first, so that a secret is at no time readable."""
    base = key.base(directory)
    for folder in (directory, base.parent):
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    secret_file, public_file = _with_suffix(base, SECRET_SUFFIX), _with_suffix(base, PUBLIC_SUFFIX)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=base.parent) as unreachable:
        made_public, made_secret = create_certificates(unreachable, base.name)
        _write_new(secret_file, Path(made_secret).read_bytes(), mode=SECRET_MODE)
        _write_new(public_file, Path(made_public).read_bytes(), mode=PUBLIC_MODE)
    return KeyFiles(key, _read_public(public_file), public_file, secret_file)


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Raises FileExistsError rather than overwrite."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask is
        file.write(content)


def _with_suffix(base: Path, suffix: str) -> Path:
    """Unlike `Path.with_suffix`, which would take the end of "gpu.1" for one."""
    return base.with_name(base.name + suffix)
