"""ZeroMQ addresses: which may be bound, and how binding fails."""

from __future__ import annotations

import ipaddress
import logging

import zmq

from asyncpipe.errors import Invalid
from asyncpipe.transport.base import LinkOptions, address_in_use

LOOPBACK_NAMES = frozenset({"localhost", "lo"})
MAX_PORT = 65_535

log = logging.getLogger(__name__)


def bind(to_bind: zmq.Socket[bytes], address: str, options: LinkOptions) -> str:
    """Bind, and return the address with its real port. Raises Invalid."""
    check_port(address)
    _check_may_bind(address, options)
    try:
        to_bind.bind(address.replace("//localhost:", "//127.0.0.1:", 1))  # ZeroMQ binds no host names
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise address_in_use(address) from None
        raise Invalid(f"cannot listen at {address}: {error.strerror}") from None
    return str(to_bind.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")


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
