"""A tensor link over a process group of two."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from asyncpipe.errors import Broken, Closed, Invalid
from asyncpipe_workers.links.base import TensorLink, TransferStatistics
from asyncpipe_workers.links.in_flight import InFlight
from asyncpipe_workers.links.threads import Outcome, Threads

CLOSE_S = 2.0  # how long `close` waits for a library's thread, which may stay until the deadline of its transfer
LAST_WORDS_S = 0.25

_SOURCE = re.compile(r"^\[[^\]]*\] ")  # "[/build/gloo/pair.cc:553] Connection closed by ..."

Wait = Callable[[], None]
"""Called on a thread, it returns when a transfer is done, and raises RuntimeError when it failed."""


class End(enum.IntEnum):
    """Ranks in the group. The receiver hosts the meeting."""

    RECEIVER = 0
    SENDER = 1

    @property
    def other(self) -> End:
        return End(1 - self)


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Of one end. `own_ip` is the address it listens on, `peer` names the other stage in errors."""

    end: End
    own_ip: str
    peer: str
    device: torch.device
    timeout_s: float
    max_in_flight: int

    def at(self, own_ip: str) -> LinkSettings:
        return replace(self, own_ip=own_ip)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A receive that is posted, or that `wait` posts, and the memory it fills."""

    tensor: torch.Tensor
    wait: Wait


class Group(Protocol):
    """A connected process group of two, seen from one end. The posting methods are called on the event loop."""

    def send(self, tag: int, tensor: torch.Tensor, after: torch.cuda.Event | None) -> Wait: ...

    def recv(self, tag: int, shape: tuple[int, ...], dtype: torch.dtype) -> Incoming: ...

    def watch(self) -> None:
        """On a thread: return when the group was aborted, raise RuntimeError when the other end is known to be gone."""
        ...

    def abort(self) -> None:
        """Make every wait and the watch return, in whatever way. Called on a thread, once."""
        ...


class GroupLink(TensorLink):
    """Owns `group` and `threads`, and lets go of both by itself when it fails."""

    def __init__(self, group: Group, threads: Threads, settings: LinkSettings) -> None:
        self._group = group
        self._threads = threads
        self._settings = settings
        self._released: asyncio.Future[None] | None = None
        self._lost: Exception | None = None
        self._in_flight = InFlight(timeout_s=settings.timeout_s, max_in_flight=settings.max_in_flight, on_failure=self._release)
        threads.submit(group.watch, self._on_watched)

    def send(self, tag: int, tensor: torch.Tensor, *, after: torch.cuda.Event | None = None) -> asyncio.Future[None]:
        self._check_end(End.SENDER)
        if tensor.device != self._settings.device:
            raise Invalid(f"this link sends tensors of {self._settings.device}; this one is on {tensor.device}")
        late = f"tensor {tag} was not taken by {self._settings.peer}"
        sent: asyncio.Future[None] = self._in_flight.begin(tag, num_bytes=tensor.nbytes, late=late)
        with self._failing():
            wait = self._group.send(tag, tensor.detach(), after)
            self._threads.submit(wait, partial(self._on_done, tag, None))
        return sent

    def recv(self, tag: int, *, shape: tuple[int, ...], dtype: torch.dtype) -> asyncio.Future[torch.Tensor]:
        return self._post_recv(tag, shape, dtype)[0]

    async def close(self) -> None:
        self._in_flight.fail(Closed(f"the link to {self._settings.peer} was closed"))
        if self._released is not None:
            await asyncio.wait([self._released], timeout=CLOSE_S)

    def statistics(self) -> TransferStatistics:
        return self._in_flight.statistics()

    def _post_recv(
        self, tag: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[asyncio.Future[torch.Tensor], Incoming | None]:
        """What is posted is None if the link failed of it, as the future then says."""
        self._check_end(End.RECEIVER)
        late = f"tensor {tag} did not come from {self._settings.peer}"
        num_bytes = math.prod(shape) * dtype.itemsize
        arrived: asyncio.Future[torch.Tensor] = self._in_flight.begin(tag, num_bytes=num_bytes, late=late)
        incoming = None
        with self._failing():
            incoming = self._group.recv(tag, shape, dtype)
            self._threads.submit(incoming.wait, partial(self._on_done, tag, incoming.tensor))
        return arrived, incoming

    def _check_end(self, end: End) -> None:
        if end is not self._settings.end:
            raise Invalid(f"this is the {self._settings.end.name.lower()}'s end of a one-way link")

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What a library raises when a transfer is posted ends the link, and reaches the caller by its future."""
        try:
            yield
        except RuntimeError as error:
            self._break(error)

    def _on_done(self, tag: int, result: torch.Tensor | None, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._break(outcome.error)
            return
        self._in_flight.finish(tag, result)
        self._end_if_lost()

    def _on_watched(self, outcome: Outcome) -> None:
        """The other end has left. What has come in full may not have been told yet."""
        if outcome.error is not None:
            self._lost = outcome.error
            self._end_if_lost()
            asyncio.get_running_loop().call_later(LAST_WORDS_S, self._break, outcome.error)

    def _end_if_lost(self) -> None:
        if self._lost is not None and not len(self._in_flight):
            self._break(self._lost)

    def _break(self, error: Exception) -> None:
        self._in_flight.fail(Broken(f"the link to {self._settings.peer} broke: {reason(error)}"))

    def _release(self) -> None:
        self._released = self._threads.release(stop=self._abort, drop=self._drop)

    def _abort(self) -> None:
        self._group.abort()

    def _drop(self) -> None:
        """The last reference: the group's sockets and threads go with it."""
        del self._group


def reason(error: Exception) -> str:
    """The first sentence of a library's error, without the place in its source."""
    lines = _SOURCE.sub("", str(error)).splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0]
