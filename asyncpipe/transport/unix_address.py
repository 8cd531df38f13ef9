"""`ipc://@name` is in Linux's abstract namespace and leaves nothing behind; `ipc://path` is a socket file."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from asyncpipe.errors import Invalid
from asyncpipe.transport.base import address_in_use

BACKLOG = 1024
SCHEME = "ipc://"
NOT_THERE = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)  # the last: too many are about to be accepted


def listening(address: str) -> socket.socket:
    """Raises Invalid."""
    path = _path_of(address)
    if path is not None:
        _clear(path, address)
    listener = _new_socket()
    try:
        listener.bind(_name_of(address))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise address_in_use(address) from None
        raise Invalid(f"cannot listen at {address}: {error.strerror or error}") from None
    return listener


def connected(address: str) -> socket.socket | None:
    """None where nobody listens. Raises Invalid."""
    connection = _new_socket()
    try:
        connection.connect(_name_of(address))
    except OSError as error:
        connection.close()
        if error.errno in NOT_THERE:
            return None
        raise Invalid(f"cannot connect to {address}: {error.strerror or error}") from None
    return connection


def remove_socket_file(address: str) -> None:
    """If it has one."""
    if path := _path_of(address):
        with contextlib.suppress(OSError):
            path.unlink()


def _new_socket() -> socket.socket:
    created = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    created.setblocking(False)
    return created


def _name_of(address: str) -> str:
    name = address.removeprefix(SCHEME)
    return f"\0{name[1:]}" if name.startswith("@") else name


def _path_of(address: str) -> Path | None:
    name = address.removeprefix(SCHEME)
    return None if name.startswith("@") else Path(name)


def _clear(path: Path, address: str) -> None:
    """What a listener that was killed has left is removed; not a stranger's file, nor the socket of a living one."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise Invalid(f"{address}: {path} exists and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.settimeout(1.0)
        probe.connect(os.fspath(path))
        raise address_in_use(address)
    path.unlink()
