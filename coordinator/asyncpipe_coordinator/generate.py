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
from asyncpipe.wire.messages import Status
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.json_results import choice_object, logprobs_objects, usage_object
from asyncpipe_coordinator.options import sampling_options
from asyncpipe_coordinator.prompts import Prompt, chat_prompts, collect_prompts, plain_prompts
from asyncpipe_coordinator.service import Service
from asyncpipe_coordinator.summary import Tally, summarize, summary_lines

MAX_IN_FLIGHT = 1024  # prompts sent to the coordinator at once

Outcome = Generation | AsyncPipeError


@dataclass(slots=True)
class Run:
    """What the summary is made of."""

    outcomes: list[Outcome | None]
    started_at_s: float = field(default_factory=time.monotonic)
    ended_at_s: float = 0.0
    status: Status | None = None

    def summary(self) -> dict[str, Any]:
        tally = Tally(seconds=self.ended_at_s - self.started_at_s)
        for outcome in self.outcomes:
            if isinstance(outcome, Generation):
                tally.add(outcome.usage)
            else:
                tally.add_failed()
        return summarize(tally, self.status)


async def generate(arguments: argparse.Namespace, config: ServiceConfig) -> int:
    """Returns the exit status: 0, or 1 when a request failed."""
    texts = collect_prompts(arguments.prompt or [], arguments.prompt_file or [])
    prompts = chat_prompts(texts, config.checkpoint) if arguments.chat else plain_prompts(texts)
    options = sampling_options(arguments, config.checkpoint)
    make_sampling(options)
    async with (
        open_service(config, quiet=arguments.quiet) as service,
        connect(await service.listen(f"inproc://asyncpipe-{secrets.token_hex(8)}")) as client,
        service.tracing(arguments.trace),
    ):
        run = await _generate_all(client, prompts, options, arguments)
    _print_summary(run, as_json=arguments.json, quiet=arguments.quiet)
    return _exit_status(run)


@contextlib.asynccontextmanager
async def open_service(config: ServiceConfig, *, quiet: bool, kind: type[Service] = Service) -> AsyncIterator[Service]:
    """A service whose start is shown as a bar: each stage joins, then loads."""
    with tqdm(
        total=2 * config.num_stages, desc="starting", unit="step", disable=quiet or None, leave=False, file=sys.stderr
    ) as bar:

        def advance(what: str, *, steps: int = 1) -> None:
            bar.set_postfix_str(what)
            bar.update(steps)

        async with kind.open(config, on_progress=advance) as service:
            bar.close()
            yield service


async def _generate_all(
    client: Client, prompts: Sequence[Prompt], options: SamplingOptions, arguments: argparse.Namespace
) -> Run:
    run = Run(outcomes=[None] * len(prompts))
    printer = _Printer(run, prompts, num_choices=arguments.n, as_json=arguments.json, quiet=arguments.quiet)
    waiting = iter(range(len(prompts)))

    async def take_turns() -> None:
        for index in waiting:
            run.outcomes[index] = await _attempt(
                client.stream(prompts[index].sent, timeout_s=arguments.timeout, **options), show=printer.shower(index)
            )
            printer.finished()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(MAX_IN_FLIGHT, len(prompts))):
            group.create_task(take_turns())
    run.ended_at_s = time.monotonic()
    printer.close()
    with contextlib.suppress(AsyncPipeError):
        run.status = await client.status()
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

    def __init__(self, run: Run, prompts: Sequence[Prompt], *, num_choices: int, as_json: bool, quiet: bool) -> None:
        self._prints_whole = as_json or len(prompts) > 1 or num_choices > 1
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
        if self._prints_whole:
            return lambda _: None
        pending = [self._prompts[index].shown]

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

    def _print(self, prompt: Prompt, outcome: Outcome) -> None:
        if self._as_json:
            line = msgspec.json.encode(as_json_object(self._next, prompt.text, outcome)).decode()
        elif isinstance(outcome, AsyncPipeError):
            print(f"asyncpipe-coordinator: error: {outcome}", file=sys.stderr)
            return
        elif not self._prints_whole:
            line = ""  # it was streamed; this ends its line
        else:
            texts = "\n---\n".join(prompt.shown + choice.text for choice in outcome.choices)
            line = f"=== prompt {self._next + 1} of {len(self._prompts)}\n{texts}\n"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def as_json_object(index: int, prompt: str, outcome: Outcome) -> dict[str, Any]:
    """One line of `--json` output."""
    if isinstance(outcome, AsyncPipeError):
        error = to_data(outcome)
        return {"index": index, "prompt": prompt, "error": {"code": error.code.value, "message": error.message}}
    line: dict[str, Any] = {
        "index": index,
        "prompt": prompt,
        "prompt_token_ids": outcome.prompt_token_ids,
        **choice_object(outcome.choices[0]),
        "usage": usage_object(outcome.usage),
    }
    if len(outcome.choices) > 1:
        line["choices"] = [choice_object(choice) for choice in outcome.choices]
    if outcome.prompt_logprobs:
        line["prompt_logprobs"] = logprobs_objects(outcome.prompt_logprobs)
    return line


def _print_summary(run: Run, *, as_json: bool, quiet: bool) -> None:
    """On standard error, so that standard output holds nothing but results."""
    if quiet:
        return
    summary = run.summary()
    if as_json:
        print(msgspec.json.encode({"summary": summary}).decode(), file=sys.stderr)
    else:
        print("\n".join(summary_lines(summary)), file=sys.stderr)


def _exit_status(run: Run) -> int:
    """2 when a prompt was refused as the user's mistake, 1 for any other failure."""
    errors = [outcome for outcome in run.outcomes if isinstance(outcome, AsyncPipeError)]
    if any(isinstance(error, Invalid) for error in errors):
        return 2
    return 1 if errors else 0
