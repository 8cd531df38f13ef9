"""A checkpoint's chat template: messages to the text that its model was trained on, as transformers renders it.

Source: transformers' `utils/chat_template_utils.py`. Templates are other people's code: they run in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from asyncpipe.errors import Invalid

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.jinja2")  # newer checkpoints; older ones have it in the next
CONFIG_FILE = "tokenizer_config.json"
DEFAULT_NAME = "default"  # among several templates

Message = Mapping[str, str]
"""{"role": "user", "content": "…"}."""


class ChatTemplate:
    def __init__(self, source: str, *, tokens: Mapping[str, str], path: Path) -> None:
        """`tokens` are the tokenizer's special ones, like "bos_token"; `path` is where the template is from, for errors."""
        self._source = source
        self._tokens = dict(tokens)
        self._path = path

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate:
        """Raises Invalid when there is none."""
        config = _read_config(directory / CONFIG_FILE)
        tokens = {name: _text(value) for name, value in config.items() if name.endswith("_token") and value}
        for name in TEMPLATE_FILES:
            if (directory / name).is_file():
                return cls((directory / name).read_text(encoding="utf-8"), tokens=tokens, path=directory / name)
        source = _chosen(config.get("chat_template"))
        if not source:
            raise Invalid(
                f"{directory} has no chat template (neither {TEMPLATE_FILES[0]} nor one in {CONFIG_FILE}): it is no chat model;"
                " leave --chat out"
            )
        return cls(source, tokens=tokens, path=directory / CONFIG_FILE)

    def render(self, messages: Sequence[Message]) -> str:
        """All of `messages`, and the beginning of the answer. Special tokens are in the text. Raises Invalid."""
        try:
            rendered: str = self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:  # whatever a template does
            raise Invalid(f"{self._path}: the chat template fails: {' '.join(str(error).split())[:300]}") from None
        return rendered

    @cached_property
    def _template(self) -> Any:
        return _environment().from_string(self._source)


class _Generation(Extension):
    """`{% generation %}` marks what the model has written, which matters in training only."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(text: str) -> str:
    return datetime.now().strftime(text)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Invalid(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    return found if isinstance(found, dict) else {}


def _chosen(templates: Any) -> str | None:
    """One template, or several with names."""
    if isinstance(templates, list):
        named = {each.get("name"): each.get("template") for each in templates if isinstance(each, dict)}
        templates = named.get(DEFAULT_NAME)
    return templates if isinstance(templates, str) else None


def _text(token: Any) -> str:
    """Tokens are texts, or objects that have one."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
