"""`asyncpipe-coordinator`: the command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.process import die_with_parent, exit_on_term, run
from asyncpipe_coordinator.bench_options import BENCH_EPILOG, add_bench_options
from asyncpipe_coordinator.flags import Parser
from asyncpipe_coordinator.keygen import DEFAULT_DIRECTORY, KEYGEN_EPILOG
from asyncpipe_coordinator.options import (
    add_cluster_options,
    add_model_options,
    add_sampling_options,
    check_log_level,
    config_of,
)

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DEFAULT_BIND = "tcp://127.0.0.1:5550"

EPILOG = """examples:
  asyncpipe-coordinator generate --prompt 'import '                  the bundled model, one stage
  asyncpipe-coordinator generate ./opt-1.3b --stages 2 --prompt Hi   a model directory, two stages
  asyncpipe-coordinator batch --input in.jsonl --output out.jsonl    a file of prompts, resumable
  asyncpipe-coordinator serve facebook/opt-125m --stages 2           a hub model, for clients
  asyncpipe-coordinator bench --stages 2 --prompt-len 128            how fast is it, and where does the time go?
  asyncpipe-coordinator generate --device sim:layer_ms=10 --stages 16 --prompt x --trace trace.json
"""

GENERATE_EPILOG = """examples:
  asyncpipe-coordinator generate --prompt 'def ' --stages 2
  asyncpipe-coordinator generate ./opt-1.3b --stages 3 --split 8,8,8 --prompt Hello --prompt World --json
  asyncpipe-coordinator generate --prompt-file prompts.txt --temperature 0.8 --seed 7
  asyncpipe-coordinator generate ./opt-30b --percent 20 80 0 100 100 0 --gpu-batch-size 48 --num-gpu-batches 3 --prompt Hi
  echo 'class Stack:' | asyncpipe-coordinator generate
"""

BATCH_EPILOG = """examples:
  asyncpipe-coordinator batch ./opt-1.3b --stages 2 --input prompts.jsonl --output texts.jsonl
  asyncpipe-coordinator batch --input requests.jsonl --output results.jsonl --unordered --max-new-tokens 200

lines of the input:
  {"prompt": "Once upon a time", "max_new_tokens": 50, "custom_id": "a"}
  {"prompt_token_ids": [2, 100, 657], "temperature": 0.8, "seed": 7}
  {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello", "max_tokens": 20}}

Parameters given as flags hold for lines that do not set them. Killed at any moment and run again, the command finishes with
every line exactly once.
"""

SERVE_EPILOG = """examples:
  asyncpipe-coordinator serve --stages 2
  asyncpipe-coordinator serve ./opt-30b --stages 4 --workers external --bind tcp://0.0.0.0:5550 --keys asyncpipe-keys
  asyncpipe-coordinator serve ./opt-1.3b --stages 2 --bind tcp://127.0.0.1:0 --json

then, in Python:
  async with asyncpipe.connect("tcp://127.0.0.1:5550") as client:
      print((await client.generate("Hello", max_new_tokens=16)).text)
"""

STATUS_EPILOG = """examples:
  asyncpipe-coordinator status
  asyncpipe-coordinator status tcp://127.0.0.1:5550 --json
  asyncpipe-coordinator status tcp://gpu1:5550 --keys ./asyncpipe-keys
"""


CONVERT_EPILOG = """examples:
  asyncpipe-coordinator convert facebook/opt-1.3b ./opt-1.3b                      quicker to load, and to read in place
  asyncpipe-coordinator convert ./opt-30b ./opt-30b-4bit --compress-weight        a quarter of the bytes
  asyncpipe-coordinator convert ./opt-1.3b-np ./opt-1.3b --dtype float16 --json   FlexLLMGen's weights
  asyncpipe-coordinator convert ./opt-1.3b ./opt-1.3b-int8 --quantize int8        for generate --quantize int8
  asyncpipe-coordinator convert ./opt-30b-4bit --verify                           are all files as they were written?

MODEL may be any form of checkpoint. TARGET becomes a Hugging Face checkpoint, with one file for each layer. It appears whole
or not at all.
"""


def build_parser() -> Parser:
    parser = _parser("asyncpipe-coordinator", "Pipeline-parallel LLM inference: cut a model into stages and run it.", EPILOG)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    _add_generate(commands)
    _add_batch(commands)
    _add_serve(commands)
    _add_bench(commands)
    _add_status(commands)
    _add_convert(commands)
    _add_keygen(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C."""
    exit_on_term()
    arguments = build_parser().parse_args(argv)
    try:
        return _run(arguments)
    except Invalid as error:
        print(f"asyncpipe-coordinator: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except AsyncPipeError as error:
        print(f"asyncpipe-coordinator: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:  # before the event loop took over the signal
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; point stdout elsewhere so that its flush at exit does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _run(arguments: argparse.Namespace) -> int:
    die_with_parent()
    logging.basicConfig(
        level=check_log_level(arguments.log_level),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if arguments.command == "status":
        from asyncpipe_coordinator.status import status

        return run(lambda: status(arguments))
    if arguments.command == "convert":
        from asyncpipe_coordinator.convert import convert, worker_arguments

        argv = worker_arguments(arguments)
        return run(lambda: convert(arguments, argv))
    if arguments.command == "keygen":
        from asyncpipe_coordinator.keygen import keygen

        return keygen(arguments)
    if arguments.command == "bench":
        from asyncpipe_coordinator.bench import bench

        return bench(arguments)
    command = _model_command(arguments.command)
    config = config_of(arguments)
    return run(lambda: command(arguments, config))


def _model_command(name: str) -> Callable[..., Coroutine[Any, Any, int]]:
    """Imported when it is run, so that `--help` is quick."""
    match name:
        case "generate":
            from asyncpipe_coordinator.generate import generate

            return generate
        case "batch":
            from asyncpipe_coordinator.batch import batch

            return batch
        case _:
            from asyncpipe_coordinator.serve import serve

            return serve


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _subparser(commands, "generate", "Generate text from prompts and exit.", GENERATE_EPILOG)
    add_model_options(parser)
    parser.option("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    parser.option(
        "--prompt-file",
        action="append",
        metavar="FILE",
        help='one prompt a line (.jsonl: a JSON string or {"prompt": …} a line; -: standard input); may be repeated',
    )
    parser.option("--chat", action="store_true", help="prompts are messages, in the checkpoint's chat template; show answers")
    add_sampling_options(parser)
    parser.option("--timeout", type=float, default=3600.0, metavar="S", help="seconds for one prompt (default: 3600)")
    parser.option("--json", action="store_true", help="one JSON object a prompt on stdout, the summary on stderr")
    parser.option("--trace", metavar="FILE", help="what the stages did, for ui.perfetto.dev")
    parser.option("--quiet", action="store_true", help="no progress, no summary")


def _add_batch(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _subparser(commands, "batch", "Generate for every line of a file; run again, it goes on.", BATCH_EPILOG)
    add_model_options(parser)
    parser.option("--input", metavar="FILE", help="one JSON object a line: prompt or prompt_token_ids, and parameters")
    parser.option("--output", metavar="FILE", help="one JSON object a line")
    parser.option("--errors", metavar="FILE", help="lines that cannot be done, and why (default: OUTPUT.errors.jsonl)")
    parser.option("--unordered", action="store_true", help="write lines as they finish, not in the order of the input")
    parser.option("--overwrite", action="store_true", help="start afresh, even where output exists")
    add_sampling_options(parser)
    parser.option("--timeout", type=float, default=86400.0, metavar="S", help="seconds for one line (default: 86400)")
    parser.option("--json", action="store_true", help="the summary as JSON on stdout")
    parser.option("--trace", metavar="FILE", help="what the stages did, for ui.perfetto.dev")
    parser.option("--quiet", action="store_true", help="no progress, no summary")


def _add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _subparser(commands, "serve", "Serve a model to clients until stopped.", SERVE_EPILOG)
    add_model_options(parser)
    add_cluster_options(parser)
    parser.option("--bind", default=DEFAULT_BIND, metavar="ADDRESS", help=f"for clients (default: {DEFAULT_BIND})")
    parser.option("--json", action="store_true", help="print one JSON line with the address when ready")
    parser.add_argument("--announce", metavar="ADDRESS", help=argparse.SUPPRESS)


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _subparser(commands, "bench", "Time a model and a policy, as FlexLLMGen does.", BENCH_EPILOG)
    add_model_options(parser)
    add_bench_options(parser)


def _add_status(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _subparser(commands, "status", "Show what a running coordinator does.", STATUS_EPILOG)
    parser.add_argument("address", nargs="?", default=DEFAULT_BIND, metavar="ADDRESS", help=f"default: {DEFAULT_BIND}")
    parser.option("--keys", metavar="DIR", help="a directory with a client's keys, for a coordinator that asks for them")
    parser.option("--json", action="store_true", help="all of it as one JSON object")
    parser.option("--log-level", default="warning", metavar="LEVEL", help="debug, info, warning or error")


def _add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _subparser(commands, "convert", "Make a checkpoint that is quick to load, and may be compressed.", CONVERT_EPILOG)
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub name, or FlexLLMGen's weights")
    parser.add_argument("target", nargs="?", metavar="TARGET", help="the directory to make")
    parser.option("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto, as it is stored)")
    parser.switch("--compress-weight", help="matrices in 4 bits, by groups (default: false)")
    parser.option("--quantize", metavar="int8|int4", help="as generate --quantize multiplies them (int4: --compress-weight)")
    parser.option("--group-size", type=int, default=64, metavar="N", help="numbers that share a scale (default: 64)")
    parser.option("--verify", action="store_true", help="convert nothing; compare TARGET with its checksums")
    parser.option("--overwrite", action="store_true", help="replace TARGET")
    parser.option("--json", action="store_true", help="the summary as JSON on stdout")
    parser.option("--quiet", action="store_true", help="no progress, no summary")
    parser.option("--log-level", default="warning", metavar="LEVEL", help="debug, info, warning or error")


def _add_keygen(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _subparser(commands, "keygen", "Make keys, for workers and clients on other machines.", KEYGEN_EPILOG)
    help_of_directory = f"where keys are kept (default: {DEFAULT_DIRECTORY})"
    parser.add_argument("directory", nargs="?", default=DEFAULT_DIRECTORY, metavar="DIR", help=help_of_directory)
    parser.option("--worker", action="append", metavar="NAME", help="one more key, for a worker; may be repeated")
    parser.option("--client", action="append", metavar="NAME", help="one more key, for a client; may be repeated")
    parser.option("--json", action="store_true", help="what was made as one JSON object, without secrets")
    parser.option("--log-level", default="warning", metavar="LEVEL", help="debug, info, warning or error")


def _parser(name: str, description: str, epilog: str) -> Parser:
    return Parser(prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)


def _subparser(commands: argparse._SubParsersAction[Parser], name: str, description: str, epilog: str) -> Parser:
    return commands.add_parser(
        name,
        help=description,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
