"""What the stage actor drives, all synchronous, on its compute thread: step messages in, hidden states or tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import torch

from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import MAX_CONTEXT_TOKENS, Delta, LoadStage, PromptLogprobs, TierReport
from asyncpipe_workers.batch import StageSequences
from asyncpipe_workers.decode_graph import Capture, CudaCapture, DecodeGraphs, GraphedSweep, graphs_are_wanted
from asyncpipe_workers.decode_tape import DecodeTapes, TapedSweep, tapes_are_wanted
from asyncpipe_workers.grouping import AllThatWait, Grouping, OneByOne
from asyncpipe_workers.indices import indices
from asyncpipe_workers.layout import StepLayout
from asyncpipe_workers.memory.activations import DeviceActivations
from asyncpipe_workers.memory.kv import ArenaKV, PagedKV
from asyncpipe_workers.memory.weights import ResidentWeights
from asyncpipe_workers.output import ArrivedStep, Posting, StageOutput, joined
from asyncpipe_workers.sampling import sample, score
from asyncpipe_workers.stage_memory import StageMemory, load_stage_memory
from asyncpipe_workers.staging import StagingRing
from asyncpipe_workers.sweep import Result, Sweep, Work

# More rows at once gain nothing on a CPU, and what lies between two products should stay in its caches.
CPU_BATCH_ROWS = 512
STAGING_BUFFERS = 8  # page-locked, for hidden states on their way between a GPU and messages
STAGED_ROWS = 512  # of a step; larger ones are copied without


class StageModel:
    """The layers of one stage and the keys and values of its sequences."""

    link_s = 0.0
    posts_hidden = False

    def __init__(
        self, memory: StageMemory, *, hidden_size: int, eos_token_ids: frozenset[int], is_whole_pipeline: bool
    ) -> None:
        self._memory = memory
        self._hidden_size = hidden_size
        self._device = memory.device
        self._dtype = memory.dtype
        self._is_first = memory.units.embedding is not None
        self._is_last = memory.units.head_input is not None
        self._is_whole_pipeline = is_whole_pipeline
        self._sequences = StageSequences(memory.cache, device=memory.device, eos_token_ids=eos_token_ids)
        self._sweep: Sweep | GraphedSweep | TapedSweep = Sweep(
            memory.units, memory.weights, memory.cache, memory.activations, overlap=memory.policy.overlap
        )
        if graphs_are_wanted(memory.device):
            self.use_graphs(CudaCapture(memory.device))
        if tapes_are_wanted():
            self._use_tapes()
        staged_bytes = STAGED_ROWS * hidden_size * memory.dtype.itemsize
        self._staging = StagingRing(memory.device, num_buffers=STAGING_BUFFERS, buffer_bytes=staged_bytes)
        self._batch_rows = CPU_BATCH_ROWS if memory.device.type == "cpu" else MAX_CONTEXT_TOKENS
        self._grouping: Grouping = OneByOne()
        if memory.policy.moves_weights:
            self._grouping = AllThatWait(self._sequences.members, lingers=is_whole_pipeline)
        self.num_params = memory.num_params
        self.param_bytes = memory.param_bytes
        self.kv_blocks = memory.cache.num_blocks
        self.kv_block_bytes = memory.kv_block_bytes
        self.transfers = memory.transfers

    @classmethod
    def load(cls, plan: LoadStage, *, device: str = "cpu") -> StageModel:
        """Read the plan's layers, and only those. Raises Invalid for a bad checkpoint or dtype, or too little memory."""
        memory, hidden_size = load_stage_memory(plan, torch.device(device))
        return cls(
            memory,
            hidden_size=hidden_size,
            eos_token_ids=frozenset(plan.eos_token_ids),
            is_whole_pipeline=plan.num_stages == 1,
        )

    def use_graphs(self, capture: Capture) -> None:
        """For steps that only continue sequences, if all that they need is on the device and of shapes that stay."""
        memory, sweep = self._memory, self._sweep
        if not (memory.is_static and isinstance(memory.cache, PagedKV) and isinstance(sweep, Sweep)):
            return
        if isinstance(memory.weights, ResidentWeights) and isinstance(memory.activations, DeviceActivations):
            graphs = DecodeGraphs(
                units=memory.units,
                weights=memory.weights,
                cache=memory.cache,
                hidden_size=self._hidden_size,
                dtype=memory.dtype,
                device=memory.device,
                capture=capture,
            )
            self._sweep = GraphedSweep(sweep, graphs)

    def _use_tapes(self) -> None:
        """For steps that only continue sequences, if all that they need is in memory."""
        memory, sweep = self._memory, self._sweep
        if not (isinstance(memory.cache, ArenaKV) and isinstance(memory.weights, ResidentWeights) and isinstance(sweep, Sweep)):
            return
        if isinstance(memory.activations, DeviceActivations):
            first = int(self._is_first)
            layers = [memory.weights.acquire(first + index) for index in range(len(memory.units.layers))]
            self._sweep = TapedSweep(sweep, DecodeTapes(layers, memory.cache))

    @property
    def tiers(self) -> TierReport:
        return self._memory.report

    def forget_all(self) -> None:
        self._sequences.forget_all()

    def close(self) -> None:
        self._memory.close()

    def use_threads(self, num_threads: int) -> None:
        if num_threads not in (0, torch.get_num_threads()):
            torch.set_num_threads(num_threads)

    def choose(self, arrived: Callable[[], Sequence[ArrivedStep]]) -> int:
        return self._grouping.choose(arrived)

    @torch.inference_mode()
    def compute(self, steps: Sequence[ArrivedStep]) -> Iterator[StageOutput]:
        """Raises Invalid for a step that does not follow from those before."""
        outputs = self._pass(steps)
        if not (self._is_whole_pipeline and any(arrived.step.delta.num_steps > 1 for arrived in steps)):
            yield from outputs
            return
        for arrived, output in zip(steps, list(outputs), strict=True):
            yield joined([output, *self._further(arrived, output)])

    def _further(self, arrived: ArrivedStep, output: StageOutput) -> Iterator[StageOutput]:
        """The steps at once that follow the first: its members go on with the tokens of the one before."""
        for _ in range(arrived.step.delta.num_steps - 1):
            step = msgspec.structs.replace(arrived.step, delta=Delta(token_ids=output.token_ids))
            (output,) = self._pass([ArrivedStep(step, arrived.arrived_ns)])
            yield output

    def _pass(self, steps: Sequence[ArrivedStep]) -> Iterator[StageOutput]:
        """One pass over the weights."""
        start_s = time.monotonic()
        layouts = [self._sequences.apply(arrived.step.micro_batch, arrived.step.delta) for arrived in steps]
        works = [self._work(number, steps[number], layout) for number, layout in enumerate(layouts) if len(layout)]
        results = self._sweep.run(works) if works else iter(())
        for layout in layouts:
            yield self._output(next(results)) if len(layout) else StageOutput()
        if works:
            assert next(results, None) is None  # noqa: S101 - there are none left, and the pass comes to its end
            self._grouping.done((arrived.step.micro_batch for arrived in steps), time.monotonic() - start_s)

    def _work(self, number: int, arrived: ArrivedStep, layout: StepLayout) -> Work:
        batches = list(layout.batches(self._memory.policy.gpu_batch_size, self._batch_rows))
        scored_rows = [row for span in self._scored(layout) for row in range(span.start, span.start + len(span.following))]
        return Work(number, layout, self._input(arrived, layout), batches, scored_rows)

    def _output(self, result: Result) -> StageOutput:
        if not self._is_last:
            return self._hidden_output(result.output)
        layout, logits_RV = result.work.layout, result.output
        num_sampled = len(layout.sampled)
        sampled = sample(logits_RV[:num_sampled], [member.sampler for member in layout.sampled])
        return StageOutput(
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            prompt_logprobs=self._scores(layout, logits_RV[num_sampled:]),
        )

    def _hidden_output(self, hidden_TD: torch.Tensor) -> StageOutput:
        if not self.posts_hidden:
            copy = self._staging.to_host(hidden_TD)
            copy.wait()
            return StageOutput(hidden=copy.tensor)
        if hidden_TD.device.type != "cuda":
            return StageOutput(posted=Posting(hidden_TD))
        hidden_TD = hidden_TD.clone()  # a decode graph's output is overwritten by its next step
        return StageOutput(posted=Posting(hidden_TD, torch.cuda.current_stream(hidden_TD.device).record_event()))

    def _scores(self, layout: StepLayout, logits_RV: torch.Tensor) -> tuple[PromptLogprobs, ...]:
        """Each row of a chunk is scored against the prompt token that follows it."""
        scores, row = [], 0
        for span in self._scored(layout):
            end = row + len(span.following)
            scores.append(PromptLogprobs(span.number, score(logits_RV[row:end], span.following, span.num_top)))
            row = end
        return tuple(scores)

    def _scored(self, layout: StepLayout) -> Iterator[_ScoredSpan]:
        """Of sequences that ask for it."""
        for member, start, end, position in layout.spans:
            num_top = member.sampler.sampling.prompt_logprobs
            following = member.sampler.token_ids[position + 1 : min(position + 1 + end - start, member.sampler.num_prompt)]
            if num_top is not None and following:
                yield _ScoredSpan(member.number, start, following, num_top)

    def _input(self, arrived: ArrivedStep, layout: StepLayout) -> torch.Tensor:
        if self._is_first:
            return indices(layout.token_ids, self._device)
        shape, in_message = (len(layout), self._hidden_size), arrived.step.hidden
        hidden = self._staging.to_device(in_message) if in_message is not None else arrived.hidden
        if hidden is None or tuple(hidden.shape) != shape:
            found = None if hidden is None else tuple(hidden.shape)
            raise Invalid(f"the step needs hidden states of shape {shape}; it came with {found}")
        return hidden.to(device=self._device, dtype=self._dtype)


class _ScoredSpan(NamedTuple):
    """Rows from `start` on, one for each of the prompt tokens that follow them."""

    number: int
    start: int
    following: Sequence[int]
    num_top: int
