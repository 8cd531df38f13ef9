"""torch.cuda of an emulated machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

from tests.emulated_cuda.graphs import Graph
from tests.emulated_cuda.machine import Machine, Stream
from tests.emulated_cuda.order import Clock
from tests.emulated_cuda.tensors import Emulation

CUDA, META = 1, 14  # of c10::DeviceType
# torch composes them of an empty tensor and a larger result.
RESIZING = ("arange.default", "arange.start", "arange.start_step")
PINNABLE = ("empty", "zeros", "ones", "full", "tensor")


@contextmanager
def emulated_cuda(*, num_cards: int = 2, card_bytes: int = 1 << 30) -> Iterator[Machine]:
    """Within, torch finds CUDA devices. Raises the first Hazard at the end, if it has not been heard of."""
    _device_constructors()  # it remembers torch's functions when it is first asked for them: not ours
    machine = Machine(num_cards=num_cards, card_bytes=card_bytes)
    library, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    with _device_guard(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emulation, "_current", Emulation(machine))
        for name, value in _functions(machine).items():
            patch.setattr(torch.cuda, name, value)
        for name in PINNABLE:
            patch.setattr(torch, name, _pinning(getattr(torch, name), machine))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: machine.pin(tensor.clone()))
        patch.setattr(torch.Tensor, "is_pinned", machine.is_pinned)
        library.fallback(_call, "CUDA")
        for name in RESIZING:
            operators.impl(name.removesuffix(".default"), partial(_call, attrgetter(name)(torch.ops.aten)), "CUDA")
        try:
            yield machine
        finally:
            library._destroy()
            operators._destroy()
    if machine.hazards:
        raise machine.hazards[0]


def _call(operator: Any, *args: Any, **kwargs: Any) -> Any:
    return Emulation.current().call(operator, args, kwargs)


@contextmanager
def _device_guard() -> Iterator[None]:
    """torch's C++ side asks who can switch between CUDA devices before it looks who computes: nobody has to, as for `meta`."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    register = c10._ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE
    register.argtypes, register.restype = (ctypes.c_int8, ctypes.c_void_p), None
    register(CUDA, guards[META])
    try:
        yield
    finally:
        register(CUDA, None)


def _pinning(make: Callable[..., torch.Tensor], machine: Machine) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.pop("pin_memory", False):
            return machine.pin(make(*args, **kwargs))
        if make.__name__ == "tensor" and kwargs.get("device") is not None:
            return make(*args, **kwargs | {"device": None}).to(kwargs["device"])
        return make(*args, **kwargs)

    return made


def _functions(machine: Machine) -> dict[str, Any]:
    """What takes the place of torch.cuda's."""

    class CudaStream:
        def __init__(self, device: Any = None, priority: int = 0, *, state: Stream | None = None) -> None:
            self.state = state or machine.new_stream(machine.device(device))
            machine.contexts |= set() if state else {self.device.index}

        @property
        def device(self) -> torch.device:
            return self.state.device

        def wait_event(self, event: CudaEvent) -> None:
            event.wait(self)

        def wait_stream(self, other: CudaStream) -> None:
            self.wait_event(other.record_event())

        def record_event(self, event: CudaEvent | None = None) -> CudaEvent:
            event = event or CudaEvent()
            event.record(self)
            return event

        def synchronize(self) -> None:
            self.record_event().synchronize()

        def query(self) -> bool:
            return self.record_event().query()

        def __eq__(self, other: object) -> bool:
            return isinstance(other, CudaStream) and other.state is self.state

        def __hash__(self) -> int:
            return self.state.number

    class CudaEvent:
        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
            self._clock = Clock()

        def record(self, stream: CudaStream | None = None) -> None:
            state = (stream or current_stream()).state
            with machine.lock:
                machine.launch(state)
                self._clock = Clock(state.clock)

        def wait(self, stream: CudaStream | None = None) -> None:
            if machine.thread.capture:
                raise RuntimeError("a graph cannot wait for what is not in it")
            with machine.lock:
                (stream or current_stream()).state.clock.learn(self._clock)

        def query(self) -> bool:
            with machine.lock:
                machine.learn(self._clock)
            return True

        def synchronize(self) -> None:
            if machine.thread.capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            with machine.lock:
                machine.wait(self._clock, "an event")

    class device:
        def __init__(self, which: Any) -> None:
            self._card = machine.device(which).index

        def __enter__(self) -> None:
            self._before, machine.thread.card = machine.thread.card, self._card

        def __exit__(self, *_: object) -> None:
            machine.thread.card = self._before

    @contextmanager
    def stream(chosen: CudaStream | None) -> Iterator[None]:
        if chosen is None:
            yield
            return
        index = chosen.device.index
        before = machine.stream(chosen.device)
        with device(index):
            machine.thread.streams[index] = chosen.state
            try:
                yield
            finally:
                machine.thread.streams[index] = before

    def current_stream(which: Any = None) -> CudaStream:
        return CudaStream(state=machine.stream(machine.device(which)))

    def synchronize(which: Any = None) -> None:
        with machine.lock:
            index = machine.device(which).index
            machine.wait(machine.clock_of(index), "the device")

    def set_device(which: Any) -> None:
        machine.thread.card = machine.device(which).index
        machine.contexts.add(machine.thread.card)

    def mem_get_info(which: Any = None) -> tuple[int, int]:
        machine.contexts.add(machine.device(which).index)
        return machine.card_bytes, machine.card_bytes

    def get_device_properties(which: Any = None) -> SimpleNamespace:
        index = machine.device(which).index
        return SimpleNamespace(name="Emulated card", uuid=f"card-{index}", total_memory=machine.card_bytes)

    @contextmanager
    def graph(graph: CudaGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        synchronize()
        with torch.cuda.stream(stream or CudaStream()):
            machine.thread.capture = graph
            try:
                yield
            finally:
                machine.thread.capture = None
                graph.end()

    class CudaGraph(Graph):
        def __init__(self) -> None:
            super().__init__(Emulation.current())

    return {
        "CUDAGraph": CudaGraph,
        "Event": CudaEvent,
        "Stream": CudaStream,
        "_lazy_init": lambda: None,
        "current_device": lambda: machine.thread.card,
        "current_stream": current_stream,
        "device": device,
        "device_count": lambda: machine.num_cards,
        "get_device_properties": get_device_properties,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "max_memory_allocated": lambda which=None: 0,
        "mem_get_info": mem_get_info,
        "set_device": set_device,
        "stream": stream,
        "synchronize": synchronize,
    }
