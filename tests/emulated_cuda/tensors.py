"""Tensors of an emulated card: the numbers are in CPU memory, and torch is told that they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import DispatchKey

from tests.emulated_cuda.kernels import KERNELS
from tests.emulated_cuda.machine import GARBAGE, Copy, Machine, Stream
from tests.emulated_cuda.order import Extent, Memory

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
ALLOCATING = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided")
# The host must know their results, or the shapes of them.
SYNCHRONIZING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
WHOLE = frozenset({"aten::scaled_dot_product_attention"})  # though torch composes it, of kernels that a CPU has not


class CardTensor(torch.Tensor):
    """`numbers` is a CPU tensor of the same shape and strides."""

    numbers: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, device: torch.device, memory: Memory) -> CardTensor:
        with torch.inference_mode(numbers.is_inference()):
            found: CardTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                numbers.shape,
                strides=numbers.stride(),
                storage_offset=numbers.storage_offset(),
                dtype=numbers.dtype,
                device=device,
            )
        found.numbers, found.memory = numbers, memory
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return Emulation.current().call(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device)

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def __repr__(self) -> str:
        return f"CardTensor({list(self.shape)}, {self.dtype}, {self.device})"

    def record_stream(self, stream: Any) -> None:
        self.memory.users.add(stream.state.number)


@dataclass
class Operation:
    """What torch is asked to do, with what."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.func._schema.name

    @property
    def cards(self) -> list[CardTensor]:
        return [each for each in leaves((self.args, self.kwargs)) if isinstance(each, CardTensor)]

    @property
    def is_no_work(self) -> bool:
        """For the card: memory is taken, or seen in another shape."""
        return self.func.is_view or self.name in ALLOCATING

    @property
    def synchronizes(self) -> bool:
        """The host waits for a number."""
        if self.name in INDEXING:
            chosen = [index for index in self.args[1] if index is not None]
            return any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, CardTensor) for index in chosen)
        return not SYNCHRONIZING.isdisjoint(self.func.tags)

    def accesses(self) -> list[tuple[CardTensor, bool]]:
        """Each tensor of a card that it uses, and whether it writes to it."""
        arguments = self.func._schema.arguments
        named = [*zip(arguments, self.args, strict=False)]
        named += [(argument, self.kwargs[argument.name]) for argument in arguments if argument.name in self.kwargs]
        return [
            (card, argument.alias_info is not None and argument.alias_info.is_write)
            for argument, value in named
            for card in leaves(value)
            if isinstance(card, CardTensor)
        ]

    def compute(self, numbers_of: Callable[[Any], Any] | None = None) -> Any:
        """On the CPU."""
        numbers_of = numbers_of or plain
        if own := KERNELS.get(self.name):
            return own(*mapped(numbers_of, self.args))
        kwargs = {key: value for key, value in self.kwargs.items() if key not in ("device", "pin_memory", "layout")}
        return self.func(*mapped(numbers_of, self.args), **mapped(numbers_of, kwargs))


class Emulation:
    """Runs what torch is asked to do with tensors of cards."""

    _current: Emulation | None = None

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @classmethod
    def current(cls) -> Emulation:
        assert cls._current is not None, "a card's tensor has outlived its machine"
        return cls._current

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        if name not in WHOLE and func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            return func.decompose(*args, **kwargs)
        with self.machine.lock:
            device = self._device_of(name, args, kwargs)
            if func in COPIES:
                return self._copy(func, device, args, kwargs)
            if device.type == "cpu":
                raise RuntimeError(f"{name} from a card to the CPU is not emulated")
            stream = self.machine.stream(device)
            return self._run(Operation(func, args, kwargs), stream)

    def _run(self, operation: Operation, stream: Stream) -> Any:
        """As work of the stream, or of the graph that is captured."""
        if operation.synchronizes:
            self._wait_for(stream, operation.name)
        if self.machine.thread.capture and not operation.is_no_work:
            return self.machine.thread.capture.record(operation, stream)
        if not operation.is_no_work:
            self.launch(operation, stream)
        return self.wrapped(operation, operation.compute(), stream)

    def launch(self, operation: Operation, stream: Stream) -> None:
        """Raises Hazard."""
        self.machine.launch(stream)
        for card, writes in operation.accesses():
            self.machine.access(card.memory, extent_of(card.numbers), stream, writes=writes, what=operation.name)

    def wrapped(self, operation: Operation, found: Any, stream: Stream) -> Any:
        cards = operation.cards
        return mapped(lambda each: self._wrapped(operation, cards, each, stream), found)

    def _wrapped(self, operation: Operation, cards: list[CardTensor], found: Any, stream: Stream) -> Any:
        if not isinstance(found, torch.Tensor):
            return found
        for card in cards:
            if card.numbers is found:
                if card.shape != found.shape:
                    raise RuntimeError(f"{operation.name} changes the shape of a tensor, which is not emulated")
                return card
        for card in cards:
            if found.numel() and storage_of(card.numbers) == storage_of(found):
                return CardTensor(found, stream.device, card.memory)
        return self._new(found, stream, "" if operation.is_no_work else operation.name)

    def _new(self, numbers: torch.Tensor, stream: Stream, what: str) -> CardTensor:
        """In memory that the stream's last work has filled, if it was `what`."""
        memory = Memory(stream.number, self.machine.free)
        if what:
            self.machine.access(memory, extent_of(numbers), stream, writes=True, what=what)
        return CardTensor(numbers, stream.device, memory)

    # --- copies ---

    def _copy(self, func: Any, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.copy_.default:
            target, source = args[:2]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            (source,), target, waits = args, None, not kwargs.get("non_blocking", False)
        crosses = isinstance(source, CardTensor) != (device.type == "cuda")
        if not crosses and device.type == "cuda":
            stream = self.machine.stream(device)
            kwargs = {key: value for key, value in kwargs.items() if key != "non_blocking"}
            return self._run(Operation(func, args, kwargs), stream)
        if self.machine.thread.capture:
            raise RuntimeError("a copy between host and card cannot be captured")
        if device.type == "cuda":
            return self._to_card(source, target, device, kwargs.get("dtype"), waits=waits)
        return self._to_host(source, target, kwargs.get("dtype"), waits=waits)

    def _to_card(
        self, source: torch.Tensor, target: CardTensor | None, device: torch.device, dtype: Any, *, waits: bool
    ) -> CardTensor:
        stream = self.machine.stream(device)
        if target is None:
            target = self._new(torch.empty_like(source, dtype=dtype or source.dtype), stream, "")
        number = self.machine.launch(stream)
        extent, numbers = extent_of(target.numbers), target.numbers
        self.machine.access(target.memory, extent, stream, writes=True, what="a copy to the card")
        if waits or not self.machine.is_pinned(source):
            _move(source, numbers)
            if waits:
                self._wait_for(stream, "a copy to the card")
            return target
        as_it_was = source.clone()

        def finish() -> None:
            if not torch.equal(_bits(source), _bits(as_it_was)):
                self.machine.fail("page-locked memory was changed while it was copied to the card")
            _move(source, numbers)

        self.machine.copy_later(Copy(target.memory, extent, stream.number, number, finish))
        return target

    def _to_host(self, source: CardTensor, target: torch.Tensor | None, dtype: Any, *, waits: bool) -> torch.Tensor:
        stream = self.machine.stream(source.device)
        if target is None:
            target = torch.empty_like(source.numbers, dtype=dtype or source.dtype)
            if not waits:
                self.machine.pin(target)
        number = self.machine.launch(stream)
        self.machine.access(source.memory, extent_of(source.numbers), stream, writes=False, what="a copy to the host")
        if waits or not self.machine.is_pinned(target):
            self._wait_for(stream, "a copy to the host")
            _move(source.numbers, target)
            return target
        as_it_is = source.numbers.clone()
        _bits(target).fill_(GARBAGE)
        nowhere = Memory(stream.number, lambda _: None)
        self.machine.copy_later(Copy(nowhere, Extent(0, 0), stream.number, number, lambda: _move(as_it_is, target)))
        return target

    # --- what is checked ---

    def _device_of(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
        """Where it runs, or where a copy goes. Raises RuntimeError for tensors that are not together."""
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            return self.machine.device(device) if device.type == "cuda" else device
        if name == "aten::copy_":
            return args[0].device
        tensors = [each for each in leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        devices = {each.device for each in tensors if isinstance(each, CardTensor)}
        strangers = [each for each in tensors if not isinstance(each, CardTensor) and each.dim()]
        if len(devices) > 1 or (strangers and name not in INDEXING):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {[t.device for t in tensors]}")
        return devices.pop()

    def _wait_for(self, stream: Stream, what: str) -> None:
        if self.machine.thread.capture:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        stream.clock.learn(self.machine.host)
        self.machine.wait(stream.clock, what)


def leaves(value: Any) -> Iterator[Any]:
    """What is in lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, dict):
        yield from leaves([*value.values()])
    else:
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """With every leaf changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(change, each) for each in value)
    if isinstance(value, dict):
        return {key: mapped(change, each) for key, each in value.items()}
    return change(value)


def plain(each: Any) -> Any:
    return each.numbers if isinstance(each, CardTensor) else each


def extent_of(numbers: torch.Tensor) -> Extent:
    start = numbers.storage_offset()
    length = 1 + sum((size - 1) * stride for size, stride in zip(numbers.shape, numbers.stride(), strict=True))
    return Extent(start * numbers.itemsize, (start + (length if numbers.numel() else 0)) * numbers.itemsize)


def storage_of(numbers: torch.Tensor) -> int:
    return numbers.untyped_storage().data_ptr()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.is_contiguous() else tensor


def _move(source: torch.Tensor, target: torch.Tensor) -> None:
    with torch.inference_mode():
        target.copy_(source)
