"""The order between loading and computing on the device: by itself on a CPU, by events of two streams on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from asyncpipe_workers.memory.disk import CHUNK_BYTES, DiskFile

Mark = torch.cuda.Event | None
"""In the work of a stream; None where work is done at once."""


class Streams:
    """On CUDA, bytes arrive on a stream of their own. Events say when a unit is there, and when computing is done with it;
    nothing waits for the whole device, nor for a unit other than the one that it needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loads = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._bounce = threading.local()

    def read(self, file: DiskFile, offset: int, target: torch.Tensor) -> None:
        """From disk to the device's memory; through page-locked memory where the device is a GPU."""
        if self._loads is None:
            file.read(offset, target.numpy().data)
            return
        if not hasattr(self._bounce, "buffer"):
            self._bounce.buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        bounce = self._bounce.buffer[: len(target)]
        file.read(offset, bounce.numpy().data)
        with torch.cuda.stream(self._loads):
            target.copy_(bounce, non_blocking=True)
            copied = self._loads.record_event()
        copied.synchronize()  # the bounce buffer may be used again

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """What is done within comes after loads that were begun."""
        with torch.cuda.stream(self._loads) if self._loads is not None else contextlib.nullcontext():
            yield

    def loaded(self) -> Mark:
        """Everything that was begun to load until now."""
        return None if self._loads is None else self._loads.record_event()

    def computed(self) -> Mark:
        """Everything that the calling thread has begun to compute until now."""
        return None if self._loads is None else torch.cuda.current_stream(self._device).record_event()

    def compute_after(self, mark: Mark) -> None:
        """What the calling thread computes from now on comes after it."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def load_after(self, mark: Mark) -> None:
        """Loads from now on come after it."""
        if self._loads is not None and mark is not None:
            self._loads.wait_event(mark)

    def join(self) -> None:
        """What comes next, on either side, comes after both."""
        loaded, computed = self.loaded(), self.computed()
        self.compute_after(loaded)
        self.load_after(computed)
