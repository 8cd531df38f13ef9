"""What the stage actor drives, all synchronous, on its compute thread: a step message in, hidden states or tokens out."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import LoadStage, PromptLogprobs, Step
from asyncpipe.wire.tensors import DType, Tensor
from asyncpipe_workers.batch import StageSequences, StepLayout
from asyncpipe_workers.memory.available import available_bytes
from asyncpipe_workers.memory.kv import KVShape, make_kv_cache
from asyncpipe_workers.models.opt import OPTStage
from asyncpipe_workers.models.registry import load_stage
from asyncpipe_workers.output import StageOutput
from asyncpipe_workers.sampling import Sampled, sample, score

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

with warnings.catch_warnings():
    # torch warns, once in a process, that it cannot protect read-only memory. Received hidden states are never written to.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class StageModel:
    """The layers of one stage and the keys and values of its sequences."""

    link_s = 0.0

    def __init__(
        self,
        layers: OPTStage,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shape: KVShape,
        num_blocks: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._layers = layers
        self._dtype = dtype
        self._device = device
        self._cache = make_kv_cache(shape, num_blocks=num_blocks, device=device)
        self._sequences = StageSequences(self._cache, device=device, eos_token_ids=eos_token_ids)
        self.num_params = layers.num_params
        self.param_bytes = layers.param_bytes
        self.kv_blocks = num_blocks
        self.kv_block_bytes = shape.block_bytes

    @classmethod
    def load(cls, plan: LoadStage, *, device: str = "cpu") -> StageModel:
        """Read the plan's layers, and only those. Raises Invalid for a bad checkpoint or dtype, or too little KV memory."""
        if plan.dtype not in DTYPES:
            raise Invalid(f"dtype {plan.dtype}: use one of {', '.join(DTYPES)}")
        if not 0 <= plan.first_layer < plan.last_layer or not 0 <= plan.stage < plan.num_stages:
            raise Invalid(f"stage {plan.stage} of {plan.num_stages} cannot hold layers {plan.first_layer} to {plan.last_layer}")
        target, dtype = torch.device(device), DTYPES[plan.dtype]
        layers = load_stage(
            Path(plan.checkpoint), plan.config_json, first=plan.first_layer, last=plan.last_layer, dtype=dtype, device=target
        )
        shape = KVShape(
            num_layers=len(layers.layers),
            num_heads=layers.config.num_heads,
            head_size=layers.config.head_size,
            dtype=dtype,
            max_context_len=plan.max_context_len,
            max_sequences=plan.max_sequences,
            block_tokens=plan.kv_block_tokens,
        )
        return cls(
            layers,
            dtype=dtype,
            device=target,
            shape=shape,
            num_blocks=_num_blocks(plan, shape, target),
            eos_token_ids=frozenset(plan.eos_token_ids),
        )

    @torch.inference_mode()
    def step(self, message: Step, *, arrived_at_s: float = 0.0) -> StageOutput:
        """Apply the message's delta and compute. Raises Invalid for a step that does not follow from those before."""
        layout = self._sequences.apply(message.micro_batch, message.delta)
        if not layout.token_ids:
            return StageOutput()
        hidden_TD = self._layers(self._input(message, layout), layout, self._cache)
        if self._layers.head is None:
            return StageOutput(hidden=_to_wire(hidden_TD))
        sampled = self._sample(hidden_TD, layout)
        return StageOutput(
            token_ids=sampled.token_ids, logprobs=sampled.logprobs, prompt_logprobs=self._score_prompts(hidden_TD, layout)
        )

    def _sample(self, hidden_TD: torch.Tensor, layout: StepLayout) -> Sampled:
        if not layout.sampled or self._layers.head is None:
            return Sampled(())
        return sample(self._layers.head(hidden_TD[layout.sampled_rows]), [member.sampler for member in layout.sampled])

    def _score_prompts(self, hidden_TD: torch.Tensor, layout: StepLayout) -> tuple[PromptLogprobs, ...]:
        """For sequences that ask: each row of a chunk is scored against the prompt token that follows it."""
        scored = []
        for member, start, end, position in layout.spans:
            num_top = member.sampler.sampling.prompt_logprobs
            following = member.sampler.token_ids[position + 1 : min(position + 1 + end - start, member.sampler.num_prompt)]
            if num_top is not None and following and self._layers.head is not None:
                logits_RV = self._layers.head(hidden_TD[start : start + len(following)])
                scored.append(PromptLogprobs(member.number, score(logits_RV, following, num_top)))
        return tuple(scored)

    def _input(self, message: Step, layout: StepLayout) -> torch.Tensor:
        if self._layers.embedding is not None:
            return torch.tensor(layout.token_ids, dtype=torch.long, device=self._device)
        shape = (len(layout.token_ids), self._layers.config.hidden_size)
        if message.hidden is None or message.hidden.shape != shape:
            found = None if message.hidden is None else message.hidden.shape
            raise Invalid(f"the step needs hidden states of shape {shape}; it came with {found}")
        return _from_wire(message.hidden).to(device=self._device, dtype=self._dtype)


def _num_blocks(plan: LoadStage, shape: KVShape, device: torch.device) -> int:
    """As many as the plan's memory takes. Raises Invalid when not even one sequence of a block fits."""
    num_bytes = plan.kv_bytes
    if num_bytes is None:
        num_bytes = int(available_bytes(device) * plan.kv_share)
    if num_bytes < shape.block_bytes:
        raise Invalid(
            f"{num_bytes} bytes of KV memory on stage {plan.stage}; one block of {shape.block_tokens} tokens needs"
            f" {shape.block_bytes}: use a larger --kv-memory"
        )
    return min(num_bytes // shape.block_bytes, shape.most_blocks)


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
