"""The `batch` command: a file of requests in, a file of results out, to the end however often it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from asyncpipe.client import Client, Generation, connect
from asyncpipe.client.sampling import make_sampling
from asyncpipe.errors import AsyncPipeError, Busy, Invalid, Timeout
from asyncpipe_coordinator.batch_files import ResultWriter
from asyncpipe_coordinator.batch_input import InputLine, count_lines, read_lines
from asyncpipe_coordinator.batch_lines import (
    BatchRequest,
    LineFormat,
    find_custom_id,
    openai_result,
    parse_line,
    plain_result,
)
from asyncpipe_coordinator.batch_order import Reorder
from asyncpipe_coordinator.config import ServiceConfig
from asyncpipe_coordinator.generate import open_service
from asyncpipe_coordinator.options import sampling_options
from asyncpipe_coordinator.summary import Tally, summarize, summary_lines

MAX_IN_FLIGHT = 1024  # lines sent to the coordinator at once
MAX_BEGUN = 8192  # lines read and not written yet: those in flight, and those that wait for an earlier one


async def batch(arguments: argparse.Namespace, config: ServiceConfig) -> int:
    """Returns the exit status: 0, also when lines had errors; they are in the errors file."""
    input_path, output = _path(arguments.input, "--input"), _path(arguments.output, "--output")
    defaults = sampling_options(arguments, config.checkpoint)
    make_sampling(defaults)
    total = count_lines(input_path)
    arithmetic = [config.policy_of(stage).arithmetic for stage in range(config.num_stages)]
    fingerprint = msgspec.json.encode([str(config.checkpoint), config.dtype, arithmetic, defaults]).decode()
    with ResultWriter(
        output,
        input_path=input_path,
        fingerprint=fingerprint,
        errors=Path(arguments.errors) if arguments.errors else None,
        overwrite=arguments.overwrite,
    ) as writer:
        num_before = writer.num_done
        run = _Run(writer, input_path, defaults=dict(defaults), arguments=arguments, model=config.checkpoint.name, total=total)
        summary = await run.finish(config) if num_before < total else summarize(Tally(), None)
        writer.finish()
    summary |= {"lines": total, "done_before": num_before, "line_errors": writer.num_errors}
    _print_summary(summary, arguments)
    return 0


class _Run:
    """What is left of a batch."""

    def __init__(
        self,
        writer: ResultWriter,
        input_path: Path,
        *,
        defaults: dict[str, Any],
        arguments: argparse.Namespace,
        model: str,
        total: int,
    ) -> None:
        self._writer = writer
        self._input_path = input_path
        self._defaults = defaults
        self._arguments = arguments
        self._model = model
        self._tally = Tally()
        self._in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._order: Reorder[dict[str, Any] | None] = Reorder(MAX_BEGUN)
        self._has_room = asyncio.Event()
        self._bar = tqdm(
            total=total,
            initial=writer.num_done,
            desc="batch",
            unit="line",
            disable=arguments.quiet or None,
            leave=False,
            file=sys.stderr,
        )

    async def finish(self, config: ServiceConfig) -> dict[str, Any]:
        """Every line that is not done; returns the summary. Raises what the pipeline was lost by, for good."""
        async with (
            open_service(config, quiet=self._arguments.quiet) as service,
            connect(await service.listen(f"inproc://asyncpipe-{secrets.token_hex(8)}")) as client,
            service.tracing(self._arguments.trace),
        ):
            start_s = time.monotonic()
            try:
                await self._all_lines(client)
            finally:
                self._bar.close()
            self._tally.seconds = time.monotonic() - start_s
            return summarize(self._tally, await client.status())

    async def _all_lines(self, client: Client) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for line in self._open_lines():
                    await self._room_for(line.number)
                    group.create_task(self._one(client, line), name=f"line {line.number}")
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    def _open_lines(self) -> Iterator[InputLine]:
        return (line for line in read_lines(self._input_path) if not self._writer.is_done(line.number))

    async def _room_for(self, line: int) -> None:
        """No deadline: a line in flight has one."""
        await self._in_flight.acquire()
        while not self._order.has_room:
            self._has_room.clear()
            await self._has_room.wait()
        self._order.expect(line)

    async def _one(self, client: Client, line: InputLine) -> None:
        """One line, from its bytes to its record."""
        result = None
        try:
            request = _parsed(line)
            generation = await self._generate(client, request)
        except (Invalid, Timeout) as error:
            self._tally.add_failed()
            self._writer.write_error(line.number, find_custom_id(line.data) if line.data else None, error)
        else:
            self._tally.add(generation.usage)
            result = self._result(request, generation)
        finally:
            self._in_flight.release()
        self._write(line.number, result)
        self._show()

    async def _generate(self, client: Client, request: BatchRequest) -> Generation:
        """Again when there was no room. Raises StageLost when the pipeline is lost for good: the line is not to blame."""
        deadline_s = time.monotonic() + self._arguments.timeout
        while True:
            try:
                return await client.generate(
                    request.prompt,
                    timeout_s=max(deadline_s - time.monotonic(), 0.001),
                    priority=request.priority,
                    **(self._defaults | request.options),
                )
            except Busy as busy:
                await asyncio.sleep(max(busy.retry_after_s, 0.01))

    def _result(self, request: BatchRequest, generation: Generation) -> dict[str, Any]:
        if request.format is LineFormat.OPENAI:
            return openai_result(request, generation, self._model)
        return plain_result(request, generation)

    def _write(self, line: int, result: dict[str, Any] | None) -> None:
        """At once, or when all earlier lines are written; None is a line that went to the errors file."""
        if self._arguments.unordered and result is not None:
            self._writer.write_result(line, result)
            result = None
        for number, ready in self._order.push(line, result):
            if ready is not None:
                self._writer.write_result(number, ready)
        self._has_room.set()

    def _show(self) -> None:
        self._bar.update()
        elapsed_s = self._bar.format_dict["elapsed"]
        if elapsed_s:
            self._bar.set_postfix_str(f"{self._tally.completion_tokens / elapsed_s:.0f} tokens/s", refresh=False)


def _parsed(line: InputLine) -> BatchRequest:
    if line.data is None:
        raise line.error or Invalid("an empty line")
    return parse_line(line.data, line.number)


def _path(value: str | None, flag: str) -> Path:
    if not value:
        raise Invalid(f"{flag} FILE is needed")
    return Path(value)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one to report: groups of groups hold what ended the batch, and what it took along."""
    flat: list[BaseException] = []
    for error in errors.exceptions:
        flat.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in flat if isinstance(error, AsyncPipeError)), flat[0])


def _print_summary(summary: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(msgspec.json.encode({"summary": summary}).decode())
    elif not arguments.quiet:
        done = f"{summary['lines']} lines, {summary['done_before']} of them done before, {summary['line_errors']} with errors"
        print("\n".join([done, *(summary_lines(summary) if summary["requests"] else [])]), file=sys.stderr)
