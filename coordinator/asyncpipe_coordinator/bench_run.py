"""Runs a benchmark's requests: all are there before the first step, and every token's arrival is timed at the client.

Requests arrive one by one. So that the first one does not make a micro-batch of its own, a gate in front of the pipeline is
closed until all are waiting; then each micro-batch begins with a whole block.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from asyncpipe.client import Client
from asyncpipe.errors import AsyncPipeError, Invalid, Timeout
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.core.commands import Command
from asyncpipe_coordinator.core.limits import Limits
from asyncpipe_coordinator.core.machine import Machine
from asyncpipe_coordinator.core.sequences import MicroBatch
from asyncpipe_coordinator.generate import open_service
from asyncpipe_coordinator.service import Service
from asyncpipe_coordinator.shell.coordinator import Tick

SUBMIT_TIMEOUT_S = 120.0
POLL_S = 0.005
MAX_TRIES = 100  # to draw prompts that differ

Prompt = tuple[int, ...]


class Gate(enum.Enum):
    """Which steps may be issued."""

    OPEN = "open"
    FIRST = "first"  # one of each micro-batch
    CLOSED = "closed"


class GatedMachine(Machine):
    """Requests come in while the gate is closed, and wait."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._gate = Gate.OPEN
        self._passed: set[int] = set()

    def set_gate(self, gate: Gate) -> None:
        """The next event issues what it lets through."""
        self._gate = gate
        self._passed.clear()

    def _issue(self, epoch: int, micro_batch: MicroBatch, at_s: float) -> list[Command]:
        if self._gate is Gate.CLOSED or (self._gate is Gate.FIRST and micro_batch.index in self._passed):
            return []
        issued = super()._issue(epoch, micro_batch, at_s)
        if issued:
            self._passed.add(micro_batch.index)
        return issued


class GatedService(Service):
    """A service whose steps its owner can hold back."""

    _machine: GatedMachine

    def _make_machine(self) -> Machine:
        return GatedMachine(super()._make_machine().limits)

    @property
    def num_waiting(self) -> int:
        return self._machine.statistics().waiting

    def set_gate(self, gate: Gate) -> float:
        """Returns when, on `time.perf_counter`."""
        self._machine.set_gate(gate)
        now_s = time.perf_counter()
        self._ref.signal(Tick())
        return now_s


@contextlib.asynccontextmanager
async def open_gated(config: ServiceConfig, *, quiet: bool) -> AsyncIterator[GatedService]:
    """Like `generate.open_service`."""
    async with open_service(config, quiet=quiet, kind=GatedService) as service:
        assert isinstance(service, GatedService)  # noqa: S101 - `open` makes one of its class
        yield service


@dataclass(slots=True, kw_only=True)
class Run:
    """What was seen. `arrivals_s` has a list for each request, in seconds since the start; a pause between the phases does not
    count. `between` is the status in that pause."""

    arrivals_s: list[list[float]]
    before: Status
    between: Status | None
    after: Status


@dataclass(slots=True)
class _Clock:
    """Seconds since the start, on `time.perf_counter`, without the pause."""

    start_s: float
    paused_at_s: float = math.inf
    pause_s: float = 0.0

    def elapsed_s(self, at_s: float) -> float:
        return at_s - self.start_s - (self.pause_s if at_s > self.paused_at_s else 0.0)


@dataclass(slots=True)
class Runner:
    service: GatedService
    client: Client
    timeout_s: float  # for each request
    quiet: bool

    async def run(self, prompts: Sequence[Prompt], num_tokens: int, *, name: str, split_phases: bool = False) -> Run:
        """`num_tokens` for each of `prompts`. With `split_phases` decode waits until all prefill has ended.

        Raises what the first request failed with.
        """
        requests = _Requests(prompts, num_tokens)
        self.service.set_gate(Gate.CLOSED)
        with _bar(len(prompts) * num_tokens, name, "token", quiet=self.quiet) as bar:
            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(len(prompts)):
                        group.create_task(requests.one(index, self.client, timeout_s=self.timeout_s, bar=bar))
                    await self._all_wait(len(prompts))
                    before, between = await self.client.status(), None
                    clock = _Clock(self.service.set_gate(Gate.FIRST if split_phases else Gate.OPEN))
                    if split_phases:
                        between = await self._pause(requests, clock)
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        requests.check()
        return Run(
            arrivals_s=[[clock.elapsed_s(at_s) for at_s in times] for times in requests.arrived_at_s],
            before=before,
            between=between,
            after=await self.client.status(),
        )

    async def _all_wait(self, count: int) -> None:
        try:
            async with asyncio.timeout(SUBMIT_TIMEOUT_S):
                while self.service.num_waiting < count:  # noqa: ASYNC110 - the scheduling core has no events
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Timeout(
                f"{self.service.num_waiting} of {count} requests were with the coordinator after {SUBMIT_TIMEOUT_S:g} s"
            ) from None

    async def _pause(self, requests: _Requests, clock: _Clock) -> Status:
        """Between the phases; returns the status, in which nothing moves."""
        await requests.prefilled.wait()  # requests have a deadline, and a failed one ends this
        clock.paused_at_s = time.perf_counter()
        status = await self.client.status()
        clock.pause_s = self.service.set_gate(Gate.OPEN) - clock.paused_at_s
        return status


class _Requests:
    """Those of one run, and when their tokens came."""

    def __init__(self, prompts: Sequence[Prompt], num_tokens: int) -> None:
        self.arrived_at_s: list[list[float]] = [[] for _ in prompts]
        self.prefilled = asyncio.Event()  # each has a token
        self._prompts = prompts
        self._num_tokens = num_tokens
        self._num_without = len(prompts)

    async def one(self, index: int, client: Client, *, timeout_s: float, bar: tqdm[NoReturn]) -> None:
        arrived_at_s = self.arrived_at_s[index]
        stream = client.stream(self._prompts[index], max_new_tokens=self._num_tokens, ignore_eos=True, timeout_s=timeout_s)
        async for _ in stream:
            arrived_at_s.append(time.perf_counter())
            bar.update()
            if len(arrived_at_s) == 1:
                self._num_without -= 1
                if not self._num_without:
                    self.prefilled.set()

    def check(self) -> None:
        """Raises AsyncPipeError when a request has ended early: its figures would mean nothing."""
        for index, arrived_at_s in enumerate(self.arrived_at_s):
            if len(arrived_at_s) != self._num_tokens:
                raise AsyncPipeError(f"request {index} ended after {len(arrived_at_s)} of {self._num_tokens} tokens")


def random_prompts(count: int, length: int, *, vocab_size: int, seed: int) -> list[Prompt]:
    """All different; the same for the same seed. Raises Invalid when there are not so many."""
    generator = np.random.default_rng(seed)
    prompts: dict[Prompt, None] = {}
    for _ in range(MAX_TRIES):
        drawn = generator.integers(0, vocab_size, size=(count - len(prompts), length))
        prompts.update(dict.fromkeys(map(tuple, drawn.tolist())))
        if len(prompts) == count:
            return list(prompts)
    raise Invalid(f"--prompt-len {length} is too short for {count} different prompts; use a larger one")


def _bar(total: int, name: str, unit: str, *, quiet: bool) -> tqdm[NoReturn]:
    return tqdm(total=total, desc=name, unit=unit, disable=quiet or None, leave=False, file=sys.stderr)
