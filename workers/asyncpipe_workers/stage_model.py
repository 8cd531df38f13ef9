"""What the stage actor drives, all synchronous, on its compute thread: a step message in, hidden states or tokens out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import Step
from asyncpipe.wire.tensors import DType, Tensor
from asyncpipe_workers.batch import MicroBatch, StepLayout
from asyncpipe_workers.memory.kv import KVCache
from asyncpipe_workers.models.opt import OPTStage
from asyncpipe_workers.models.registry import load_stage
from asyncpipe_workers.sampling import sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

with warnings.catch_warnings():
    # torch warns, once in a process, that it cannot protect read-only memory. Received hidden states are never written to.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class StageOutput:
    """`hidden` (T, D), except on the last stage, which gives `token_ids` in micro-batch order."""

    hidden: Tensor | None = None
    token_ids: tuple[int, ...] = ()


class StageModel:
    """The layers of one stage and the caches of all micro-batches."""

    def __init__(self, layers: OPTStage, *, dtype: torch.dtype, device: torch.device, max_context_len: int) -> None:
        self._layers = layers
        self._dtype = dtype
        self._device = device
        self._max_context_len = max_context_len
        self._micro_batches: dict[int, MicroBatch] = {}
        self.num_params = layers.num_params
        self.param_bytes = layers.param_bytes

    @classmethod
    def load(
        cls,
        *,
        checkpoint: Path,
        first_layer: int,
        last_layer: int,
        num_stages: int,
        stage: int,
        dtype: str,
        max_context_len: int,
        device: str = "cpu",
    ) -> StageModel:
        """Read layers [first_layer, last_layer), and only those. Raises Invalid for a bad checkpoint or dtype."""
        if dtype not in DTYPES:
            raise Invalid(f"dtype {dtype}: use one of {', '.join(DTYPES)}")
        if not 0 <= first_layer < last_layer or not 0 <= stage < num_stages:
            raise Invalid(f"stage {stage} of {num_stages} cannot hold layers {first_layer} to {last_layer}")
        target = torch.device(device)
        layers = load_stage(checkpoint, first=first_layer, last=last_layer, dtype=DTYPES[dtype], device=target)
        return cls(layers, dtype=DTYPES[dtype], device=target, max_context_len=max_context_len)

    @property
    def cache_bytes(self) -> int:
        return sum(micro_batch.cache.num_bytes for micro_batch in self._micro_batches.values())

    @torch.inference_mode()
    def step(self, message: Step) -> StageOutput:
        """Apply the message's delta and compute. Raises Invalid for a step that does not follow from those before."""
        micro_batch = self._micro_batch(message.micro_batch)
        layout = micro_batch.apply(message.delta)
        output = self._layers(self._input(message, layout), layout, micro_batch.cache, rows=layout.last_rows)
        if self._layers.head is None:
            return StageOutput(hidden=_to_wire(output))
        return StageOutput(token_ids=sample(output, micro_batch.members))

    def reset(self) -> None:
        """Forget every sequence."""
        self._micro_batches.clear()

    def _micro_batch(self, index: int) -> MicroBatch:
        if index not in self._micro_batches:
            config = self._layers.config
            cache = KVCache(
                num_layers=len(self._layers.layers),
                num_heads=config.num_heads,
                head_size=config.head_size,
                max_context_len=self._max_context_len,
                dtype=self._dtype,
                device=self._device,
            )
            self._micro_batches[index] = MicroBatch(cache)
        return self._micro_batches[index]

    def _input(self, message: Step, layout: StepLayout) -> torch.Tensor:
        if self._layers.embedding is not None:
            return torch.tensor(layout.token_ids, dtype=torch.long, device=self._device)
        shape = (len(layout.token_ids), self._layers.config.hidden_size)
        if message.hidden is None or message.hidden.shape != shape:
            found = None if message.hidden is None else message.hidden.shape
            raise Invalid(f"the step needs hidden states of shape {shape}; it came with {found}")
        return _from_wire(message.hidden).to(device=self._device, dtype=self._dtype)


def _to_wire(x: torch.Tensor) -> Tensor:
    """Without a copy from CPU memory."""
    x = x.detach().contiguous().cpu()
    data = memoryview(x.view(torch.uint8).numpy().reshape(-1).data) if x.numel() else memoryview(b"")
    return Tensor(DType(str(x.dtype).removeprefix("torch.")), tuple(x.shape), data)


def _from_wire(tensor: Tensor) -> torch.Tensor:
    """Without a copy; the result must not be written to."""
    dtype = getattr(torch, tensor.dtype.value)
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(tensor.data, dtype=dtype).view(tensor.shape)
