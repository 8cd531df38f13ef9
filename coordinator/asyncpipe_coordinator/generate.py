"""The `generate` command: prompts in, text streamed out, one summary."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from tqdm import tqdm

from asyncpipe.client import Client, Generation, TextStream, connect
from asyncpipe.client.sampling import SamplingOptions, make_sampling
from asyncpipe.errors import AsyncPipeError, Invalid, to_data
from asyncpipe.wire.messages import StageStatus
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.prompts import collect_prompts
from asyncpipe_coordinator.service import Service

MAX_IN_FLIGHT = 1024  # prompts sent to the coordinator at once

Outcome = Generation | AsyncPipeError


@dataclass(slots=True)
class Run:
    """What the summary is made of."""

    outcomes: list[Outcome | None]
    started_at_s: float = field(default_factory=time.monotonic)
    ended_at_s: float = 0.0
    stages: tuple[StageStatus, ...] = ()

    def generations(self) -> list[Generation]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Generation)]

    def summary(self) -> dict[str, Any]:
        """Token counts; seconds and tokens/s over the whole run; the first request's time to first token; busy shares."""
        done = self.generations()
        seconds = self.ended_at_s - self.started_at_s
        num_tokens = sum(generation.usage.completion_tokens for generation in done)
        first_s = min((generation.usage.time_to_first_token_s for generation in done), default=0.0)
        return {
            "requests": len(self.outcomes),
            "failed": len(self.outcomes) - len(done),
            "prompt_tokens": sum(generation.usage.prompt_tokens for generation in done),
            "completion_tokens": num_tokens,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(num_tokens / seconds, 2) if seconds else 0.0,
            "time_to_first_token_s": round(first_s, 4),
            "stages": [_stage_summary(stage) for stage in self.stages],
        }


def _stage_summary(stage: StageStatus) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "layers": list(stage.layers),
        "num_params": stage.num_params,
        "busy_share": round(stage.busy_share, 4),
    }


async def generate(arguments: argparse.Namespace, config: ServiceConfig) -> int:
    """Returns the exit status: 0, or 1 when a request failed."""
    prompts = collect_prompts(arguments.prompt or [], arguments.prompt_file or [])
    options = sampling_options(arguments)
    make_sampling(options)
    async with _service(config, quiet=arguments.quiet) as service:
        address = await service.listen(f"inproc://asyncpipe-{secrets.token_hex(8)}")
        async with connect(address) as client:
            run = await _generate_all(client, prompts, options, arguments, service)
    _print_summary(run, as_json=arguments.json, quiet=arguments.quiet)
    return _exit_status(run)


def sampling_options(arguments: argparse.Namespace) -> SamplingOptions:
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "stop": tuple(arguments.stop or ()),
        "ignore_eos": arguments.ignore_eos,
    }


@contextlib.asynccontextmanager
async def _service(config: ServiceConfig, *, quiet: bool) -> AsyncIterator[Service]:
    """A service whose start is shown as a bar: each stage joins, then loads."""
    with tqdm(
        total=2 * config.num_stages, desc="starting", unit="step", disable=quiet or None, leave=False, file=sys.stderr
    ) as bar:

        def advance(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        async with Service.open(config, on_progress=advance) as service:
            bar.close()
            yield service


async def _generate_all(
    client: Client, prompts: Sequence[str], options: SamplingOptions, arguments: argparse.Namespace, service: Service
) -> Run:
    run = Run(outcomes=[None] * len(prompts))
    printer = _Printer(run, prompts, as_json=arguments.json, quiet=arguments.quiet)
    room = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def one(index: int) -> None:
        async with room:
            run.outcomes[index] = await _attempt(
                client.stream(prompts[index], timeout_s=arguments.timeout, **options), show=printer.shower(index)
            )
        printer.finished()

    async with asyncio.TaskGroup() as group:
        for index in range(len(prompts)):
            group.create_task(one(index))
    run.ended_at_s = time.monotonic()
    printer.close()
    with contextlib.suppress(AsyncPipeError):
        run.stages = (await client.status()).stages
    return run


async def _attempt(stream: TextStream, *, show: Callable[[str], None]) -> Outcome:
    try:
        async for piece in stream:
            show(piece.text)
    except AsyncPipeError as error:
        return error
    return stream.result


class _Printer:
    """Prints finished outcomes in the order of the prompts, with a bar on standard error when there are several."""

    def __init__(self, run: Run, prompts: Sequence[str], *, as_json: bool, quiet: bool) -> None:
        self._run = run
        self._prompts = prompts
        self._as_json = as_json
        self._next = 0
        self._bar = tqdm(
            total=len(prompts),
            desc="generating",
            unit="prompt",
            disable=True if quiet or len(prompts) == 1 else None,
            leave=False,
            file=sys.stderr,
        )

    def shower(self, index: int) -> Callable[[str], None]:
        """Shows text as it comes when there is just one prompt; several are printed whole, in order."""
        if len(self._prompts) > 1 or self._as_json:
            return lambda _: None
        pending = [self._prompts[index]]

        def show(text: str) -> None:
            sys.stdout.write("".join([*pending, text]))
            sys.stdout.flush()
            pending.clear()

        return show

    def finished(self) -> None:
        self._bar.update()
        while self._next < len(self._prompts) and (outcome := self._run.outcomes[self._next]) is not None:
            self._print(self._prompts[self._next], outcome)
            self._next += 1

    def close(self) -> None:
        self._bar.close()

    def _print(self, prompt: str, outcome: Outcome) -> None:
        if self._as_json:
            line = msgspec.json.encode(as_json_object(self._next, prompt, outcome)).decode()
        elif isinstance(outcome, AsyncPipeError):
            print(f"asyncpipe-coordinator: error: {outcome}", file=sys.stderr)
            return
        elif len(self._prompts) == 1:
            line = ""  # it was streamed; this ends its line
        else:
            line = f"=== prompt {self._next + 1} of {len(self._prompts)}\n{prompt}{outcome.text}\n"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def as_json_object(index: int, prompt: str, outcome: Outcome) -> dict[str, Any]:
    """One line of `--json` output."""
    if isinstance(outcome, AsyncPipeError):
        error = to_data(outcome)
        return {"index": index, "prompt": prompt, "error": {"code": error.code.value, "message": error.message}}
    return {
        "index": index,
        "prompt": prompt,
        "prompt_token_ids": outcome.prompt_token_ids,
        "token_ids": outcome.token_ids,
        "text": outcome.text,
        "finish_reason": outcome.finish_reason.value,
        "usage": {
            "prompt_tokens": outcome.usage.prompt_tokens,
            "completion_tokens": outcome.usage.completion_tokens,
            "total_tokens": outcome.usage.prompt_tokens + outcome.usage.completion_tokens,
            "time_to_first_token_s": round(outcome.usage.time_to_first_token_s, 4),
            "total_s": round(outcome.usage.total_s, 4),
        },
    }


def _print_summary(run: Run, *, as_json: bool, quiet: bool) -> None:
    """On standard error, so that standard output holds nothing but results."""
    if quiet:
        return
    summary = run.summary()
    if as_json:
        print(msgspec.json.encode({"summary": summary}).decode(), file=sys.stderr)
        return
    busy = ", ".join(f"stage {stage['stage']} {stage['busy_share']:.0%}" for stage in summary["stages"])
    print(
        f"{summary['completion_tokens']} tokens in {summary['seconds']:.2f} s · {summary['tokens_per_s']:.1f} tokens/s"
        f" · first token after {summary['time_to_first_token_s'] * 1000:.0f} ms · busy: {busy or 'unknown'}",
        file=sys.stderr,
    )


def _exit_status(run: Run) -> int:
    """2 when a prompt was refused as the user's mistake, 1 for any other failure."""
    errors = [outcome for outcome in run.outcomes if isinstance(outcome, AsyncPipeError)]
    if any(isinstance(error, Invalid) for error in errors):
        return 2
    return 1 if errors else 0
