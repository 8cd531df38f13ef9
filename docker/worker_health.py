"""The worker image's health check: is the worker connected to its coordinator? Exit status 0 if so.

It looks from outside, at the sockets of the container's processes, so that nothing is needed from a worker that may be stuck.
"""

import contextlib
import glob
import os
import re
import sys
from pathlib import Path

WORKER = Path("/proc/1/cmdline")  # or an init that was given the same arguments
TABLES = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]  # with the host's network, of all its processes
ESTABLISHED = "01"  # as in the kernel's include/net/tcp_states.h
REMOTE, STATE, INODE = 2, 3, 9  # columns of the tables, see proc_net_tcp.rst in the kernel's documentation


def coordinator_port() -> int:
    """Of `--coordinator tcp://host:port`, else of ASYNCPIPE_COORDINATOR."""
    command = WORKER.read_text().replace("\0", "\n")
    given = f"{command}\n--coordinator={os.environ.get('ASYNCPIPE_COORDINATOR', '')}"
    found = re.search(r"^--coordinator[=\n]tcp://\S+:([0-9]+)", given, flags=re.MULTILINE)
    if found is None:
        sys.exit("no --coordinator tcp://host:port was given")
    return int(found[1])


def own_sockets() -> set[str]:
    """Inode numbers, of all processes here."""
    sockets = set()
    for descriptor in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has just been closed
            link = os.readlink(descriptor)
            sockets.add(link.removeprefix("socket:[").removesuffix("]"))
    return sockets


def is_connected(port: int) -> bool:
    sockets = own_sockets()
    rows = [line.split() for table in TABLES if table.exists() for line in table.read_text().splitlines()[1:]]
    ports = [int(row[REMOTE].rpartition(":")[2], 16) for row in rows if row[STATE] == ESTABLISHED and row[INODE] in sockets]
    return port in ports


sys.exit(None if is_connected(coordinator_port()) else "not connected to the coordinator")
