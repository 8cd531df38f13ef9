"""The `status` command: what a running coordinator does, and how well its stages are used."""

from __future__ import annotations

import argparse

import msgspec

from asyncpipe.client import connect
from asyncpipe.wire.messages import StageStatus, Status
from asyncpipe_coordinator.tier_lines import policy_text, tiers_text, transfers_text


async def status(arguments: argparse.Namespace) -> int:
    """Raises Timeout when nobody answers at the address, Refused when it does not know our key."""
    async with connect(arguments.address, keys=arguments.keys) as client:
        found = await client.status()
    print(msgspec.json.encode(found).decode() if arguments.json else "\n".join(status_lines(found)))
    return 0


def status_lines(found: Status) -> list[str]:
    """For people."""
    pipeline, kv = found.pipeline, found.kv
    used = kv.used_blocks / kv.num_blocks if kv.num_blocks else 0.0
    return [
        f"{found.model}: {found.state} for {found.uptime_s:.0f} s, context {found.max_context_len}",
        f"requests: {found.requests_running} running, {found.requests_waiting} waiting, {found.requests_finished} finished,"
        f" {found.requests_failed} failed · tokens: {found.prompt_tokens} of prompts, {found.generated_tokens} generated",
        f"pipeline: {pipeline.num_micro_batches} micro-batches, efficiency {pipeline.efficiency:.2f},"
        f" bubble {pipeline.bubble:.0%}, a step's round trip {pipeline.round_trip_s * 1000:.1f} ms,"
        f" {pipeline.overhead_s * 1000:.1f} ms of it links and coordinator",
        f"KV memory: {used:.0%} of {kv.num_blocks} blocks of {kv.block_tokens} tokens, {kv.preemptions} preemptions",
        *(line for stage in found.stages for line in _stage_lines(stage)),
    ]


def _stage_lines(stage: StageStatus) -> list[str]:
    first, last = stage.layers
    idle = stage.idle
    line = (
        f"stage {stage.stage}: layers {first}-{last - 1} on {stage.device} (pid {stage.pid}), busy {stage.busy_share:.0%},"
        f" {stage.steps} steps; starved {idle.starved_s:.1f} s, waiting to send {idle.send_wait_s:.1f} s,"
        f" without work {idle.no_work_s:.1f} s"
    )
    details = (f"policy: {policy_text(stage.policy)}", tiers_text(stage.tiers), transfers_text(stage))
    return [line, *(f"  {text}" for text in details if text)]
