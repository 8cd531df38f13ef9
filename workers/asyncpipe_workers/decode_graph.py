"""Steady decode in one launch: a step that only continues sequences is replayed as a CUDA graph.

On a GPU a decode step of a small batch takes less time to compute than its hundreds of kernels take to launch. A graph launches
all of them at once; for that, shapes and addresses must be those of when it was captured. So rows, and the blocks of their
tables, are padded to powers of two, and what differs from step to step is copied into memory that stays: one graph for each
size. Shapes: B rows, padded, N blocks of a sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from asyncpipe_workers.layout import FixedRows, StepLayout
from asyncpipe_workers.memory.kv import PagedKV
from asyncpipe_workers.memory.weights import WeightStore
from asyncpipe_workers.models.units import StageUnits
from asyncpipe_workers.sweep import Result, Sweep, Work, sequence_of

log = logging.getLogger(__name__)

MAX_ROWS = 256  # a larger batch computes for longer than it launches
CAPTURE_AT = 4  # the step of a size that is captured: rare sizes are not worth it
SWITCH = "ASYNCPIPE_CUDA_GRAPHS"  # 0 in the environment: never

WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # operations whose results the host must know

aten = torch.ops.aten

Replay = Callable[[], torch.Tensor]
Capture = Callable[[Replay], Replay]


class Size(NamedTuple):
    rows: int
    blocks: int  # of a sequence

    @classmethod
    def of(cls, num_rows: int, num_blocks: int) -> Size:
        """The powers of two that hold them."""
        return cls(*(1 << (number - 1).bit_length() for number in (num_rows, num_blocks)))


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Of one size: `numbers` are token ids (B), positions (B) and tables (B, N), end to end, so that one copy brings them."""

    size: Size
    numbers: torch.Tensor
    hidden_BD: torch.Tensor | None  # of a stage that is not the first

    def parts(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, positions and tables of such `numbers`."""
        rows, blocks = self.size
        return numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :].view(rows, blocks)


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: _Inputs
    replay: Replay


@dataclass(slots=True, kw_only=True)
class DecodeGraphs:
    """The graphs of a stage whose weights, keys and values are all on the device."""

    units: StageUnits
    weights: WeightStore
    cache: PagedKV
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    capture: Capture
    _seen: Counter[Size] = field(default_factory=Counter, init=False)
    _graphs: dict[Size, _Graph] = field(default_factory=dict, init=False)
    _is_off: bool = field(default=False, init=False)

    def run(self, work: Work) -> torch.Tensor | None:
        """The step's result, (T, D) or (T, V), to be used before the next one is run; None if there is no graph for it."""
        if self._is_off or not work.only_continues(MAX_ROWS):
            return None
        tables = [self.cache.table(row.slot) for row in work.layout.rows]
        size = Size.of(len(tables), max(map(len, tables)))
        self._seen[size] += 1
        if size not in self._graphs and (self._seen[size] < CAPTURE_AT or not self._add(size)):
            return None
        graph = self._graphs[size]
        self._fill(graph.inputs, work, tables)
        return graph.replay()[: len(tables)]

    def _add(self, size: Size) -> bool:
        """Capture a graph. Where that cannot be, steps are launched kernel by kernel from now on."""
        hidden_BD = None
        if self.units.embedding is None:
            hidden_BD = torch.zeros(size.rows, self.hidden_size, dtype=self.dtype, device=self.device)
        numbers = torch.zeros(size.rows * (2 + size.blocks), dtype=torch.long, device=self.device)
        inputs = _Inputs(size, numbers, hidden_BD)
        inputs.parts(numbers)[2].fill_(self.cache.scratch_block)  # nobody's tokens are overwritten while it is captured
        try:
            self._graphs[size] = _Graph(inputs, self.capture(lambda: self._step(inputs)))
        except RuntimeError as error:
            log.warning("decode steps cannot be captured as a CUDA graph, and are slower for it: %s", error)
            self._is_off = True
            return False
        return True

    def _fill(self, inputs: _Inputs, work: Work, tables: Sequence[Sequence[int]]) -> None:
        numbers = torch.zeros(len(inputs.numbers), dtype=torch.long, pin_memory=self.device.type == "cuda")
        token_ids_B, positions_B, tables_BN = inputs.parts(numbers)
        tables_BN.fill_(self.cache.scratch_block)
        token_ids_B[: len(tables)] = torch.tensor(work.layout.token_ids)
        positions_B[: len(tables)] = torch.tensor([row.length - 1 for row in work.layout.rows])
        for row, table in enumerate(tables):
            tables_BN[row, : len(table)] = torch.tensor(table)
        inputs.numbers.copy_(numbers, non_blocking=True)
        if inputs.hidden_BD is not None:
            inputs.hidden_BD[: len(tables)] = work.input_T

    def _step(self, inputs: _Inputs) -> torch.Tensor:
        token_ids_B, positions_B, tables_BN = inputs.parts(inputs.numbers)
        layout = StepLayout(
            token_ids=[0] * inputs.size.rows,
            positions_T=positions_B,
            rows=[],
            spans=[],
            padding=0,
            fixed=FixedRows(positions_B, tables_BN, {}),
        )
        blocks = iter([self.weights.acquire(index) for index in range(len(sequence_of(self.units)))])
        hidden_BD = inputs.hidden_BD if inputs.hidden_BD is not None else next(blocks)(token_ids_B, positions_B)
        for _ in self.units.layers:
            hidden_BD = next(blocks)(hidden_BD, layout, self.cache)
        if self.units.head_input is None:
            return hidden_BD
        x_BE = next(blocks)(hidden_BD)
        return torch.cat([logits(x_BE) for logits in blocks], dim=1)


class GraphedSweep:
    """A sweep that replays a step where there is a graph for it."""

    def __init__(self, sweep: Sweep, graphs: DecodeGraphs) -> None:
        self._sweep = sweep
        self._graphs = graphs

    def run(self, works: Sequence[Work]) -> Iterator[Result]:
        output = self._graphs.run(works[0]) if len(works) == 1 else None
        return self._sweep.run(works) if output is None else iter([Result(works[0], output)])


def graphs_are_wanted(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get(SWITCH, "1") != "0"


class CudaCapture:
    """Graphs of one device. They take turns, so they share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Replay) -> Replay:
        """Raises RuntimeError for what a graph cannot hold."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), NoWaits():  # type: ignore[no-untyped-call]
                step()  # libraries set themselves up, which a graph cannot hold
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads talk to the device meanwhile: they wait for copies and transfers.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, what makes the host wait for the device raises RuntimeError. A capture of it would fail too, but leave torch's
    allocator in the middle of it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **kwargs)


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func is aten._to_copy.default:
        target = kwargs.get("device")
        return target is not None and target.type != args[0].device.type
    if func is aten.copy_.default:
        return bool(args[0].device.type != args[1].device.type)
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        return any(index is not None and (index.dtype == torch.bool or index.device != args[0].device) for index in args[1])
    return not WAITING.isdisjoint(func.tags)
