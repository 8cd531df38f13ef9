"""A stage that only takes time. No torch is needed.

The device is a line of time: a step begins when it has arrived and the device is free, not when a thread happens to wake up, so
that the stage is exactly as fast as it says, as an accelerator with work queued ahead would be.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from asyncpipe.errors import Invalid
from asyncpipe.simulation import Simulation
from asyncpipe.wire.messages import Delta, LoadStage, Opened, Step, TierReport
from asyncpipe.wire.tensors import Tensor
from asyncpipe_workers.output import ArrivedStep, StageOutput

VOCABULARY = 1000
FIRST_TOKEN = 5  # below are the special tokens of most vocabularies


class SimulatedStage:
    """Counts sequences and tokens as a real stage does, and raises Invalid for a step that does not fit."""

    num_params = param_bytes = 0
    posts_hidden = False
    kv_block_bytes = 0
    tiers = TierReport()
    transfers = None

    def __init__(self, simulation: Simulation, plan: LoadStage) -> None:
        self._simulation = simulation
        self._num_layers = plan.last_layer - plan.first_layer
        self._is_last = plan.stage == plan.num_stages - 1
        self._is_whole_pipeline = plan.num_stages == 1
        self._random = random.Random(f"{simulation.seed}/{plan.stage}")  # noqa: S311 - a simulation's jitter
        self._free_at_s = 0.0
        self._sequences: dict[int, _Sequence] = {}
        self._micro_batches: dict[int, list[_Sequence]] = {}
        self.kv_blocks = simulation.kv_blocks

    def use_threads(self, num_threads: int) -> None:
        """It only takes time."""

    def choose(self, arrived: Callable[[], Sequence[ArrivedStep]]) -> int:
        return 1

    def compute(self, steps: Sequence[ArrivedStep]) -> Iterator[StageOutput]:
        for arrived in steps:
            yield self._step(arrived.step, arrived.arrived_ns / 1e9)

    def forget_all(self) -> None:
        self._sequences.clear()
        self._micro_batches.clear()

    def close(self) -> None:
        """Nothing to stop."""

    def _step(self, message: Step, arrived_at_s: float) -> StageOutput:
        members = self._apply(message)
        num_steps = message.delta.num_steps if self._is_whole_pipeline else 1
        duration_s = sum(self._duration_s(message.delta) for _ in range(num_steps))
        start_s = max(self._free_at_s, arrived_at_s)
        self._free_at_s = start_s + duration_s
        token_ids = self._choose(members, num_steps) if self._is_last else ()
        hidden = None if self._is_last else self._hidden(message.delta.num_rows)
        while (left_s := self._free_at_s - time.monotonic()) > 0:
            time.sleep(left_s)
        began_ns, ended_ns = int(start_s * 1e9), int(self._free_at_s * 1e9)
        return StageOutput(token_ids=token_ids, hidden=hidden, began_ns=began_ns, ended_ns=ended_ns)

    def _choose(self, members: list[_Sequence], num_steps: int) -> tuple[int, ...]:
        """In the last of several steps at once nobody goes on with what was chosen: it comes back."""
        token_ids = chosen = [member.next_token() for member in members]
        for _ in range(num_steps - 1):
            for member, token_id in zip(members, chosen, strict=True):
                member.push(token_id)
            chosen = [member.next_token() for member in members]
            token_ids = token_ids + chosen
        return tuple(token_ids)

    @property
    def link_s(self) -> float:
        """Delay of a message on its way into the stage, and out of the last one."""
        return self._simulation.link_ms / 1e3

    def _duration_s(self, delta: Delta) -> float:
        if not delta.num_rows:
            return 0.0
        simulation = self._simulation
        num_prompt = sum(chunk.count for chunk in delta.chunks)
        tokens_us = num_prompt * simulation.prefill_us_per_token + len(delta.token_ids) * simulation.decode_us_per_token
        seconds = self._num_layers * (simulation.layer_ms / 1e3 + tokens_us / 1e6)
        return max(seconds * self._random.gauss(1.0, simulation.jitter), 0.0) if simulation.jitter else seconds

    def _hidden(self, num_rows: int) -> Tensor | None:
        if not self._simulation.hidden_size:
            return None
        return Tensor.from_numpy(np.zeros((num_rows, self._simulation.hidden_size), dtype=np.float32))

    def _apply(self, message: Step) -> list[_Sequence]:
        """The members after the step's delta."""
        delta, members = message.delta, self._micro_batches.setdefault(message.micro_batch, [])
        for number in delta.left:
            left = self._known(number)
            del self._sequences[number]
            for others in self._micro_batches.values():
                if left in others:
                    others.remove(left)
        for number in delta.parted:
            members.remove(self._known(number))
        members += [self._known(number) for number in delta.adopted]
        if len(delta.token_ids) != len(members):
            raise Invalid(f"{len(delta.token_ids)} tokens for the {len(members)} sequences of the micro-batch")
        for member, token_id in zip(members, delta.token_ids, strict=True):
            member.push(token_id)
        for opened in delta.opened:
            self._sequences[opened.sequence] = _Sequence(opened)
        for chunk in delta.chunks:
            member = self._known(chunk.sequence)
            member.num_left -= chunk.count
            if not member.num_left:
                members.append(member)
        return members

    def _known(self, number: int) -> _Sequence:
        if number not in self._sequences:
            raise Invalid(f"sequence {number} is not here")
        return self._sequences[number]


class _Sequence:
    """Its next token follows from its prompt and its length, so that a lost or mixed-up token shows."""

    def __init__(self, opened: Opened) -> None:
        self.num_left = self._length = len(opened.token_ids)
        self._checksum = 0
        for token_id in opened.token_ids:
            self._checksum = _mixed(self._checksum, token_id)

    def push(self, token_id: int) -> None:
        self._checksum = _mixed(self._checksum, token_id)
        self._length += 1

    def next_token(self) -> int:
        return FIRST_TOKEN + (self._checksum + self._length) % VOCABULARY


def _mixed(checksum: int, token_id: int) -> int:
    return (checksum * 1_000_003 + token_id) % 2**61


def simulated_tokens(prompt: list[int], count: int) -> list[int]:
    """What a simulated pipeline generates for `prompt`: for tests."""
    sequence = _Sequence(Opened(0, tuple(prompt), len(prompt)))
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(sequence.next_token())
        sequence.push(tokens[-1])
    return tokens
