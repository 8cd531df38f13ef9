"""Tensors between GPUs over NCCL.

A transfer is a kernel on a stream of NCCL's own, in the order of posting. Posting takes microseconds and is done on the event
loop, which keeps that order; nothing is ever waited for there, nor on the stream that computes. A transfer's end is a CUDA
event that a thread waits for, asleep.

While such a link is open, CUDA graphs must be captured with `capture_error_mode="thread_local"`: in the default mode the calls
of other threads, ours among them, may spoil a capture.

torch's own watching thread would end this process when a transfer is late or fails. It is not started
(`TORCH_NCCL_BLOCKING_WAIT`, which has no other effect on us); `NcclGroup.watch` looks after the group instead.
"""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from asyncpipe.errors import Broken, Invalid
from asyncpipe_workers.links.group_link import End, GroupLink, Incoming, LinkSettings, Wait

WATCH_S = 0.2  # NCCL tells of a lost peer only when it is asked
_NO_WATCHING_THREAD = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True, slots=True)
class StreamIncoming(Incoming):
    there: torch.cuda.Event


@dataclass(frozen=True, slots=True)
class Ahead:
    """A tensor whose bytes are still on their way. `arrived` is the future that `recv` would have returned."""

    arrived: asyncio.Future[torch.Tensor]
    _tensor: torch.Tensor
    _there: torch.cuda.Event

    def on_stream(self) -> torch.Tensor:
        """The tensor, for the calling thread's current stream, which waits for the bytes; the thread does not.

        When the transfer fails, the stream goes on with bytes that mean nothing: look at `arrived` before what comes of them is
        used.
        """
        stream = torch.cuda.current_stream(self._tensor.device)
        stream.wait_event(self._there)
        self._tensor.record_stream(stream)
        return self._tensor


class NcclGroup:
    """A group whose communicator exists."""

    def __init__(self, group: Any, *, end: End, device: torch.device) -> None:
        self._group = group
        self._peer = int(end.other)
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pending: dict[int, Any] = {}  # works that are not done, by tag
        self._failure: RuntimeError | None = None
        self._failing = threading.Lock()  # held while a failure is found or made: a wait that it ends must see it
        self._aborted = threading.Event()

    def send(self, tag: int, tensor: torch.Tensor, after: torch.cuda.Event | None) -> Wait:
        self._stream.wait_event(after or torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            done = self._post(tag, self._group.send([tensor.contiguous()], self._peer, tag))
        return partial(self._wait, tag, done, tensor)

    def recv(self, tag: int, shape: tuple[int, ...], dtype: torch.dtype) -> StreamIncoming:
        """Into memory of our own stream, so that a receive posted ahead waits for no computation."""
        user = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            there = self._post(tag, self._group.recv([tensor], self._peer, tag))
        tensor.record_stream(user)
        return StreamIncoming(tensor, partial(self._wait, tag, there, tensor), there)

    def watch(self) -> None:
        while not self._aborted.wait(WATCH_S):
            with self._failing:
                for work in list(self._pending.values()):
                    self._look_at(work)

    def abort(self) -> None:
        self._aborted.set()
        with self._failing:
            self._failure = self._failure or RuntimeError("the group was aborted")
        abort = getattr(self._group, "abort", None) or self._group._shutdown  # torch before 2.6
        abort()

    def _post(self, tag: int, work: Any) -> torch.cuda.Event:
        """The event of its end, of a kind that is waited for asleep."""
        work.synchronize()  # our stream waits for NCCL's; nobody else does
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        self._pending[tag] = work
        return done

    def _wait(self, tag: int, done: torch.cuda.Event, tensor: torch.Tensor) -> None:
        """`tensor` is kept alive until then. The event of a transfer that was aborted happens too."""
        done.synchronize()
        self._pending.pop(tag, None)
        with self._failing:
            if self._failure is not None:
                raise self._failure

    def _look_at(self, work: Any) -> None:
        """Whether it is done: on the way, NCCL is asked for errors. The `wait` of a failed work aborts the group and raises."""
        if not work.is_completed():
            return
        try:
            work.wait()
        except RuntimeError as error:
            self._failure = error
            raise


class NcclLink(GroupLink):
    """A link whose receiver can let a stream wait for a tensor, rather than itself."""

    def recv_ahead(self, tag: int, *, shape: tuple[int, ...], dtype: torch.dtype) -> Ahead:
        """As `recv`, but the tensor is handed out at once, to queue computation that begins when it is there."""
        arrived, incoming = self._post_recv(tag, shape, dtype)
        if not isinstance(incoming, StreamIncoming):  # it could not be posted, and the link is dead
            raise arrived.exception() or Broken("the receive was not posted")
        return Ahead(arrived, incoming.tensor, incoming.there)


def check(device: torch.device) -> None:
    if device.type != "cuda":
        raise Invalid(f"NCCL links carry tensors of GPUs, not of {device}: choose gloo, or zmq")
    if not torch.distributed.is_nccl_available():
        raise Invalid("this build of torch has no NCCL: choose zmq")
    if device.index is None:
        raise Invalid("say which card: cuda:0, not cuda")


def connect(store: Store, settings: LinkSettings) -> NcclGroup:
    """Blocks until a first transfer has come through, for that is when NCCL connects. Raises RuntimeError.

    NCCL chooses its own addresses (`NCCL_SOCKET_IFNAME`), whatever `settings` say.
    """
    os.environ.setdefault(_NO_WATCHING_THREAD, "1")
    from torch.distributed import ProcessGroupNCCL

    timeout = timedelta(seconds=settings.timeout_s)
    options: Any = ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.is_high_priority_stream = True  # the next stage waits for it
    make: Any = ProcessGroupNCCL
    group = make(store, int(settings.end), len(End), options)
    with torch.cuda.device(settings.device):
        first = torch.zeros(1, device=settings.device)
        post = group.send if settings.end is End.SENDER else group.recv
        post([first], int(settings.end.other), 0).wait(timeout)
    return NcclGroup(group, end=settings.end, device=settings.device)
