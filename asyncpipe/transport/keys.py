"""What one process knows of CURVE keys: its own, its coordinator's, and whom it lets in.

Keys come from a directory (`key_files`) or from the environment, never from a command line, which every user of a machine
can read. Only `tcp://` uses them: whoever can reach `ipc://`, `inproc://` and `memory://` is this user already.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from asyncpipe.errors import Invalid
from asyncpipe.transport.key_files import (
    COORDINATOR,
    FOLDERS,
    NAME_VARIABLE,
    check_directory,
    read_allowed,
    read_coordinator_key,
    read_own_pair,
)
from asyncpipe.transport.key_pair import KeyPair, check_public_key

__all__ = ["KeyPair", "Keys", "load_keys"]

DIRECTORY_VARIABLE = "ASYNCPIPE_KEYS"
OWN_VARIABLE = "ASYNCPIPE_SECRET_KEY"
COORDINATOR_VARIABLE = "ASYNCPIPE_COORDINATOR_KEY"
ALLOWED_VARIABLES = {"worker": "ASYNCPIPE_ALLOWED_WORKERS", "client": "ASYNCPIPE_ALLOWED_CLIENTS"}


@dataclass(slots=True, eq=False)
class Keys:
    """`allowed` says in which roles the owner of a public key may connect to this process; nobody else may.

    It is read in another thread (`zap`), so it is only ever changed by one step: see `allow` and `disallow`.
    """

    own: KeyPair
    coordinator: str | None = None  # public key of the coordinator to connect to
    allowed: dict[str, frozenset[str]] = field(default_factory=dict)

    def allow(self, public: str, role: str) -> None:
        """Let the owner of `public` connect as `role` from now on, beside what it may already. Raises Invalid."""
        check_public_key(public, source=f"the key of a {role}")
        self.allowed[public] = self.roles_of(public) | {role}

    def disallow(self, public: str) -> None:
        """Let nobody connect with `public` any more. Links that are up stay: close them where that matters."""
        self.allowed.pop(public, None)

    def roles_of(self, public: str) -> frozenset[str]:
        """Empty for a stranger."""
        return self.allowed.get(public, frozenset())


def load_keys(directory: Path | None, *, role: str, env: Mapping[str, str] = os.environ) -> Keys | None:
    """The keys of a `coordinator`, `worker` or `client`; None when none are given.

    From `directory`, else from that in ASYNCPIPE_KEYS, else from ASYNCPIPE_SECRET_KEY, ASYNCPIPE_COORDINATOR_KEY and, for a
    coordinator, ASYNCPIPE_ALLOWED_WORKERS and ASYNCPIPE_ALLOWED_CLIENTS (public keys, separated by commas or white space).
    Raises Invalid, one line without any key, for what is missing, unreadable, malformed, or readable by others.
    """
    if role != COORDINATOR and role not in FOLDERS:
        raise Invalid(f"{role!r} is no role with keys; use {COORDINATOR}, {' or '.join(FOLDERS)}")
    named = directory or _path(env.get(DIRECTORY_VARIABLE, ""))
    if named is not None:
        return _from_directory(named.expanduser(), role=role, name=env.get(NAME_VARIABLE, "").strip())
    return _from_environment(env, role=role)


def _path(text: str) -> Path | None:
    return Path(text) if text.strip() else None


def _from_directory(directory: Path, *, role: str, name: str) -> Keys:
    check_directory(directory)
    own = read_own_pair(directory, role=role, name=name)
    if role == COORDINATOR:
        return Keys(own, allowed=read_allowed(directory))
    return Keys(own, coordinator=read_coordinator_key(directory))


def _from_environment(env: Mapping[str, str], *, role: str) -> Keys | None:
    """Some without ASYNCPIPE_SECRET_KEY are a mistake: whoever sets them would not want a link without keys."""
    given = {name: env[name].strip() for name in (OWN_VARIABLE, *_others(role)) if env.get(name, "").strip()}
    if not given:
        return None
    if OWN_VARIABLE not in given:
        raise Invalid(f"{next(iter(given))} is set, but {OWN_VARIABLE} is not")
    own = KeyPair.of_secret(given[OWN_VARIABLE], source=OWN_VARIABLE)
    if role == COORDINATOR:
        return Keys(own, allowed=_allowed_in(given))
    if COORDINATOR_VARIABLE not in given:
        raise Invalid(f"{OWN_VARIABLE} is set, but {COORDINATOR_VARIABLE}, which a {role} needs, is not")
    return Keys(own, coordinator=check_public_key(given[COORDINATOR_VARIABLE], source=COORDINATOR_VARIABLE))


def _others(role: str) -> tuple[str, ...]:
    return tuple(ALLOWED_VARIABLES.values()) if role == COORDINATOR else (COORDINATOR_VARIABLE,)


def _allowed_in(given: Mapping[str, str]) -> dict[str, frozenset[str]]:
    allowed: dict[str, frozenset[str]] = {}
    for role, variable in ALLOWED_VARIABLES.items():
        for public in given.get(variable, "").replace(",", " ").split():
            check_public_key(public, source=f"a key in {variable}")
            allowed[public] = allowed.get(public, frozenset()) | {role}
    return allowed
