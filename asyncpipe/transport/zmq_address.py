"""ZeroMQ addresses: which may be bound, how binding fails, and what is left to clean up."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import stat
from pathlib import Path

import zmq

from asyncpipe.errors import Invalid
from asyncpipe.transport.base import LinkOptions

LOOPBACK_NAMES = frozenset({"localhost", "lo"})
MAX_PORT = 65_535

log = logging.getLogger(__name__)


def bind(to_bind: zmq.Socket[bytes], address: str, options: LinkOptions) -> str:
    """Bind, and return the address with its real port. Raises Invalid."""
    check_port(address)
    _check_may_bind(address, options)
    _check_socket_path(address)
    try:
        to_bind.bind(address.replace("//localhost:", "//127.0.0.1:", 1))  # ZeroMQ binds no host names
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise _in_use(address) from None
        raise Invalid(f"cannot listen at {address}: {error.strerror}") from None
    return str(to_bind.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")


def remove_socket_file(address: str) -> None:
    """`ipc://@name` is Linux's abstract namespace and has no file; `ipc://path` has one."""
    if path := _socket_path(address):
        with contextlib.suppress(OSError):
            path.unlink()


def check_port(address: str) -> None:
    """ZeroMQ would take the port modulo 65,536. Raises Invalid."""
    scheme, _, rest = address.partition("://")
    port = rest.rpartition(":")[2]
    if scheme == "tcp" and port != "*" and not (port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
        raise Invalid(f"{address} needs a port, tcp://HOST:PORT with PORT from 0 to {MAX_PORT}")


def _check_may_bind(address: str, options: LinkOptions) -> None:
    """Without keys, nothing but this machine may reach us."""
    scheme, _, rest = address.partition("://")
    if scheme != "tcp" or options.keys is not None or _is_loopback(rest.rpartition(":")[0]):
        return
    if not options.insecure:
        raise Invalid(
            f"{address} can be reached from other machines, which needs CURVE keys: make them with asyncpipe-coordinator"
            " keygen, or bind tcp://127.0.0.1:PORT"
        )
    log.warning("INSECURE: whoever can reach %s can use it, and whoever is on the way can read all that is said", address)


def _is_loopback(host: str) -> bool:
    try:
        return host in LOOPBACK_NAMES or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_socket_path(address: str) -> None:
    """ZeroMQ would delete whatever has that name: a stranger's file, or the socket of a living listener."""
    path = _socket_path(address)
    if path is None or not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise Invalid(f"{address}: {path} exists and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.settimeout(1.0)
        probe.connect(str(path))
        raise _in_use(address)


def _in_use(address: str) -> Invalid:
    hint = "choose another port or 0" if address.startswith("tcp://") else "choose another name"
    return Invalid(f"{address} is already in use; {hint}")


def _socket_path(address: str) -> Path | None:
    path = address.removeprefix("ipc://")
    return Path(path) if address.startswith("ipc://") and path[:1] not in ("@", "*") else None
