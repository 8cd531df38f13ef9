"""Tensors between CPUs over Gloo, which speaks TCP.

Gloo writes to its socket in whichever thread posts a transfer, as far as it gets, and its waits block: so a transfer is posted
and waited for on a thread. It has no futures for sends and receives, hence a thread for each.

When a connection ends, Gloo tells all transfers that it has not begun, and not the one that it is in the middle of. The watch
tells the link, so that nobody waits longer for the future of that one; its thread stays until its own deadline.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from asyncpipe.errors import Invalid
from asyncpipe_workers.links.base import MAX_TAG
from asyncpipe_workers.links.group_link import End, Incoming, LinkSettings, Wait

WATCH_TAG = MAX_TAG + 1  # nobody sends under it
SPARE_S = 0.5  # the link's own deadlines come first
_LONG = timedelta(days=365)
_AT_ONCE = timedelta(milliseconds=1)  # zero would be the default of the group


class GlooGroup:
    """A group whose two members are connected."""

    def __init__(self, group: Any, *, end: End, timeout_s: float) -> None:
        self._group = group
        self._timeout = timedelta(seconds=timeout_s + SPARE_S)
        self._peer = int(end.other)
        self._watched = group.recv([torch.empty(1)], self._peer, WATCH_TAG)

    def send(self, tag: int, tensor: torch.Tensor, after: torch.cuda.Event | None) -> Wait:
        """A tensor on a CPU is there when it is given: there is nothing to wait for before."""

        def wait() -> None:
            self._group.send([tensor.contiguous()], self._peer, tag).wait(self._timeout)

        return wait

    def recv(self, tag: int, shape: tuple[int, ...], dtype: torch.dtype) -> Incoming:
        tensor = torch.empty(shape, dtype=dtype)

        def wait() -> None:
            self._group.recv([tensor], self._peer, tag).wait(self._timeout)

        return Incoming(tensor, wait)

    def watch(self) -> None:
        """A receive that only ends with the connection, so that an idle link hears of it too."""
        self._watched.wait(_LONG)

    def abort(self) -> None:
        """Gloo has no abort for sends and receives; but a wait that has been too long fails all transfers of its group."""
        with contextlib.suppress(RuntimeError):
            self._watched.wait(_AT_ONCE)


def check(device: torch.device) -> None:
    if device.type != "cpu":
        raise Invalid(f"Gloo links carry tensors of CPUs, not of {device}: choose nccl, or zmq")


def connect(store: Store, settings: LinkSettings) -> GlooGroup:
    """Blocks until the other end has connected. Raises RuntimeError, at the latest after the link's time."""
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._threads = 1  # they are for collectives, and there must be one
    options._timeout = timedelta(seconds=settings.timeout_s)
    options._devices = [ProcessGroupGloo.create_device(hostname=settings.own_ip)]
    make: Any = ProcessGroupGloo  # the stubs know only its other constructor
    group = make(store, int(settings.end), len(End), options)
    return GlooGroup(group, end=settings.end, timeout_s=settings.timeout_s)
