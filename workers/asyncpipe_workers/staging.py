"""Tensors of a GPU on their way into messages and out of them, through page-locked memory.

A copy from or to ordinary memory makes the thread that asks for it wait for all that it queued before. One through page-locked
memory is queued too, on a stream of its own, and an event says when it is done. Page-locking takes milliseconds, so buffers are
made once; when all are in use, or a tensor is larger than one, it is copied as it would be without them.

On a CPU nothing is copied: messages share memory with tensors.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
import torch

from asyncpipe.wire.tensors import DType, Tensor

with warnings.catch_warnings():
    # torch warns, once in a process, that it cannot protect read-only memory. Received tensors are never written to.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def to_wire(tensor: torch.Tensor) -> Tensor:
    """Without a copy from contiguous CPU memory; from a GPU's, when all that was queued before is done."""
    return _as_wire(tensor, _memory(_bytes_of(tensor.detach().cpu()).numpy()))


def from_wire(tensor: Tensor) -> torch.Tensor:
    """On the CPU, without a copy; it must not be written to."""
    dtype = getattr(torch, tensor.dtype.value)
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(tensor.data, dtype=dtype).view(tensor.shape)


class Happening(Protocol):
    """A CUDA event, or what a test has in its place."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor that will be on the host: its bytes mean nothing before `wait` has returned.

    Its buffer goes back to the ring when nothing refers to `tensor.data` any more: when the message has been sent.
    """

    tensor: Tensor
    _there: Happening | None = None

    def wait(self) -> None:
        """Blocks, asleep: to be called on a thread that has nothing else to do."""
        if self._there is not None:
            self._there.synchronize()


@dataclass(slots=True, eq=False)
class Buffer:
    """`bytes` is (num_bytes,) uint8. It is not to be used before `last_copy` is done."""

    bytes: torch.Tensor
    last_copy: Happening | None = None


class Buffers:
    """A bounded set of equal buffers of the host. Taken on one thread, they may come back on another."""

    def __init__(self, *, num_buffers: int, buffer_bytes: int, pinned: bool) -> None:
        self._buffer_bytes = buffer_bytes
        memory = torch.empty(num_buffers, buffer_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._free = deque(Buffer(row) for row in memory)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, num_bytes: int) -> Buffer | None:
        """One that fits and that no copy uses, if there is one now."""
        if num_bytes > self._buffer_bytes:
            return None
        with self._lock:
            for _ in range(len(self._free)):
                buffer = self._free.popleft()
                if buffer.last_copy is None or buffer.last_copy.query():
                    return buffer
                self._free.append(buffer)
        return None

    def give_back(self, buffer: Buffer) -> None:
        self._free.append(buffer)

    def lend(self, buffer: Buffer, num_bytes: int) -> memoryview:
        """Its first bytes; it comes back when the last reference to them is gone."""
        array = buffer.bytes[:num_bytes].numpy()
        weakref.finalize(array, self._free.append, buffer).atexit = False
        return _memory(array)


@dataclass(frozen=True, slots=True)
class StagingStatistics:
    capacity: int
    free: int
    num_unstaged: int  # tensors that found no buffer


class StagingRing:
    """Of one device, for `num_buffers` tensors of `buffer_bytes` on their way at once; others are waited for."""

    def __init__(self, device: torch.device, *, num_buffers: int, buffer_bytes: int) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._num_buffers = num_buffers if device.type == "cuda" else 0
        self._buffers = Buffers(num_buffers=self._num_buffers, buffer_bytes=buffer_bytes, pinned=device.type == "cuda")
        self._num_unstaged = 0

    def to_host(self, tensor: torch.Tensor) -> HostCopy:
        """Of a tensor that the calling thread's current stream computes, or has computed; nothing waits."""
        if self._copies is None:
            return HostCopy(to_wire(tensor))
        buffer = self._buffers.take(tensor.nbytes)
        if buffer is None:
            self._num_unstaged += 1
            return HostCopy(to_wire(tensor))
        source = tensor.detach().contiguous()
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            buffer.bytes[: source.nbytes].copy_(_bytes_of(source), non_blocking=True)
            there = self._copies.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        source.record_stream(self._copies)
        buffer.last_copy = there
        return HostCopy(_as_wire(source, self._buffers.lend(buffer, source.nbytes)), there)

    def to_device(self, tensor: Tensor) -> torch.Tensor:
        """For the calling thread's current stream, which waits for the bytes. On a CPU it must not be written to."""
        if self._copies is None:
            return from_wire(tensor)
        buffer = self._buffers.take(tensor.nbytes)
        if buffer is None:
            self._num_unstaged += 1
            return from_wire(tensor).to(self._device)
        user = torch.cuda.current_stream(self._device)
        staged = buffer.bytes[: tensor.nbytes].copy_(_bytes_of(from_wire(tensor)))
        with torch.cuda.stream(self._copies):
            flat = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self._device).copy_(staged, non_blocking=True)
            buffer.last_copy = there = self._copies.record_event()
        self._buffers.give_back(buffer)
        user.wait_event(there)
        flat.record_stream(user)
        return flat.view(getattr(torch, tensor.dtype.value)).view(tensor.shape)

    def statistics(self) -> StagingStatistics:
        return StagingStatistics(self._num_buffers, len(self._buffers), self._num_unstaged)


def _as_wire(tensor: torch.Tensor, data: memoryview) -> Tensor:
    return Tensor(DType(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape), data)


def _memory(array: npt.NDArray[Any]) -> memoryview:
    """It keeps `array` alive, unless there is nothing in it."""
    return array.data if array.size else memoryview(b"")


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
