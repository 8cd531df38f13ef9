"""Where prompts come from: flags, files, standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncpipe.errors import Invalid
from asyncpipe_coordinator.chat import ChatTemplate
from asyncpipe_coordinator.text import TextCodec

MAX_PROMPT_FILE_BYTES = 1 << 30


class Prompt(NamedTuple):
    """What the user has written, what is sent for it, and what is shown before the answer."""

    text: str
    sent: str | tuple[int, ...]
    shown: str


def plain_prompts(texts: Sequence[str]) -> list[Prompt]:
    """Each is continued as it is."""
    return [Prompt(text, text, text) for text in texts]


def chat_prompts(texts: Sequence[str], checkpoint: Path) -> list[Prompt]:
    """Each is a user's message in a conversation of its own. Raises Invalid when the checkpoint has no chat template."""
    template, codec = ChatTemplate.load(checkpoint), TextCodec.load(checkpoint)
    rendered = [template.render([{"role": "user", "content": text}]) for text in texts]
    return [Prompt(text, codec.encode_rendered(each), "") for text, each in zip(texts, rendered, strict=True)]


def collect_prompts(given: Sequence[str], files: Sequence[str]) -> list[str]:
    """All prompts, in order: flags, then files. Without either, standard input. Raises Invalid when there is none."""
    prompts = list(given)
    for name in files:
        prompts += read_prompts(name)
    if not given and not files:
        if sys.stdin.isatty():
            raise Invalid("no prompt: give --prompt TEXT, --prompt-file FILE, or pipe prompts into standard input")
        prompts = read_prompts("-")
    if not prompts or any(not prompt for prompt in prompts):
        raise Invalid("an empty prompt: give at least one character")
    return prompts


def read_prompts(name: str) -> list[str]:
    """One prompt a line; in a `.jsonl` file each line is a JSON string or an object with "prompt". "-" is standard input."""
    text = sys.stdin.read() if name == "-" else _read_file(name)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if name.endswith(".jsonl"):
        return [_json_prompt(name, number, line) for number, line in lines]
    return [line for _, line in lines]


def _read_file(name: str) -> str:
    path = Path(name)
    try:
        if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
            raise Invalid(f"--prompt-file {name}: larger than 1 GiB; use the batch command for bulk work")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Invalid(f"--prompt-file {name}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise Invalid(f"--prompt-file {name}: not UTF-8 text") from None


def _json_prompt(name: str, number: int, line: str) -> str:
    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise Invalid(f"{name}:{number}: not JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise Invalid(f'{name}:{number}: write a JSON string, or an object with a "prompt" text')
    return prompt
