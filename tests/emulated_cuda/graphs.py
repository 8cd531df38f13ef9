"""CUDA graphs: operations that were captured, to be done again in the memory of then."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulated_cuda.machine import GARBAGE, Stream
from tests.emulated_cuda.tensors import CardTensor, Emulation, Operation, leaves, mapped, plain, storage_of


class Graph:
    def __init__(self, emulation: Emulation) -> None:
        self._emulation = emulation
        self._captured: list[tuple[Operation, torch.device, Any]] = []  # with where, and what it gave

    def record(self, operation: Operation, stream: Stream) -> Any:
        """Nothing is done: what it would write to stays as it is, and what it gives has a shape and no numbers."""
        copies = {id(card): card.numbers.clone() for card, writes in operation.accesses() if writes}
        found = operation.compute(lambda each: copies.get(id(each), plain(each)))
        written = {id(copies[id(card)]): card for card in operation.cards if id(card) in copies}

        def named(each: Any) -> Any:
            return written[id(each)] if id(each) in written else self._emulation.wrapped(operation, each, stream)

        result = mapped(named, found)
        for each in leaves(result):
            if _is_fresh(each, operation):
                each.memory.on_free = lambda _: None  # it is the graph's
        self._captured.append((operation, stream.device, result))
        return result

    def end(self) -> None:
        for operation, _, result in self._captured:
            for each in leaves(result):
                if _is_fresh(each, operation):
                    each.numbers.untyped_storage().fill_(GARBAGE)

    def replay(self) -> None:
        emulation = self._emulation
        with emulation.machine.lock, torch.inference_mode():
            for operation, device, result in self._captured:
                emulation.launch(operation, emulation.machine.stream(device))
                for found, target in zip(leaves(operation.compute()), leaves(result), strict=True):
                    if _is_fresh(target, operation):
                        target.numbers.copy_(found)


def _is_fresh(result: Any, operation: Operation) -> bool:
    """Whether its memory was allocated for it."""
    if not isinstance(result, CardTensor) or not result.numel():
        return False
    return all(storage_of(card.numbers) != storage_of(result.numbers) for card in operation.cards)
