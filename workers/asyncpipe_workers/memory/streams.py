"""The order between loading and computing on the device: by itself on a CPU, by events of two streams on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from asyncpipe_workers.memory.disk import CHUNK_BYTES, DiskFile


class Streams:
    """On CUDA, bytes arrive on a stream of their own. An event says that they are there, another that computing is done with
    what was there before; nothing waits for the whole device."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._loads = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._loaded: Any = None
        self._computed: Any = None
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
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        copied.synchronize()  # the bounce buffer may be used again

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """What is done within comes after loads that were begun."""
        with torch.cuda.stream(self._loads) if self._loads is not None else contextlib.nullcontext():
            yield

    def loaded(self) -> None:
        """Within `loading`: the unit is complete."""
        if self._loads is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._loads)
            self._loaded = event

    def await_loads(self) -> None:
        """Computing waits for the last complete unit."""
        if self._loaded is not None:
            torch.cuda.current_stream().wait_event(self._loaded)

    def computed(self) -> None:
        """Computing with a unit has been queued."""
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._computed = event

    def await_computed(self) -> None:
        """Loads wait for what was computed with the memory before."""
        if self._loads is not None and self._computed is not None:
            self._loads.wait_event(self._computed)
