"""A scheduling machine whose pipeline is up, and what tests ask of it."""

from __future__ import annotations

from asyncpipe.wire.messages import Sampling, StageTiming, Step, Tokens
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.core.limits import Limits
from asyncpipe_coordinator.core.machine import Machine

EOS = 2
TIMING = StageTiming(0, 1000)


def machine(*, kv_blocks: int = 1000, is_ring: bool = True, shares_memory: bool = False, **changes: object) -> Machine:
    settings: dict[str, object] = {
        "num_stages": 2,
        "num_micro_batches": 2,
        "max_sequences_per_micro_batch": 8,
        "max_waiting": 100,
        "max_context_len": 4096,
        "max_step_tokens": 512,
        "kv_block_tokens": 4,
        "eos_token_ids": frozenset({EOS}),
    }
    ready = Machine(Limits(**(settings | changes)))  # type: ignore[arg-type]
    pipeline = events.PipelineReady(epoch=1, kv_blocks=kv_blocks, is_ring=is_ring, shares_memory=shares_memory, at_s=0.0)
    ready.handle(pipeline)
    return ready


def submitted(
    request_id: str, *, prompt_len: int = 3, max_new_tokens: int = 4, priority: int = 0, **sampling: object
) -> events.Submitted:
    return events.Submitted(
        request_id=request_id,
        client="c",
        prompt_token_ids=(5,) * prompt_len,
        sampling=Sampling(max_new_tokens=max_new_tokens, **sampling),  # type: ignore[arg-type]
        seed=0,
        priority=priority,
        deadline_at_s=None,
        at_s=0.0,
    )


def steps(done: list[commands.Command]) -> list[Step]:
    return [command.step for command in done if isinstance(command, commands.IssueStep)]


def step_of(done: list[commands.Command], micro_batch: int) -> Step:
    (step,) = [step for step in steps(done) if step.micro_batch == micro_batch]
    return step


def tokens_of(done: list[commands.Command]) -> list[tuple[str, int, int]]:
    return [(token.request_id, token.index, token.token_id) for token in done if isinstance(token, commands.EmitToken)]


def answer(core: Machine, step: Step, *token_ids: int, number: int = 0, at_s: float = 1.0) -> list[commands.Command]:
    """To `step`, or to the one that comes `number` after it when there are several at once."""
    timings = (TIMING,) * core.limits.num_stages
    of_step = {"epoch": step.epoch, "micro_batch": step.micro_batch, "step": step.step + number}
    tokens = Tokens(**of_step, token_ids=token_ids, timings=timings)
    return core.handle(events.TokensArrived(tokens=tokens, at_s=at_s))
