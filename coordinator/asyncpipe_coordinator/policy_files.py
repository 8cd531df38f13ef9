"""Policies as users write them: a JSON or TOML file, or JSON on the command line.

One object with the names of `Policy`'s fields, or {"stages": [{…}, {…}]} with one for each stage.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from asyncpipe.errors import Invalid
from asyncpipe.policy import Compression, Placement, Policy

Settings = dict[str, Any]
"""Some of `Policy`'s fields, each of the field's type."""

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", Placement: f"one of {', '.join(Placement)}"}


def read_settings(source: str) -> Settings | tuple[Settings, ...]:
    """For all stages, or for each stage, from a file, or from `source` itself where it is a JSON object. Raises Invalid."""
    is_inline = source.lstrip().startswith("{")
    where = "--policy" if is_inline else source
    found = _parsed(source, where) if is_inline else _read(Path(source).expanduser(), where)
    if not isinstance(found, dict) or "stages" not in found:
        return _settings(found, Policy, where=where)
    others = ", ".join(sorted(found.keys() - {"stages"}))
    if others:
        raise Invalid(f"{where}: {others} stand beside stages; write them into each stage")
    stages = found["stages"]
    if not isinstance(stages, list) or not stages:
        raise Invalid(f"{where}: stages is {_shown(stages)}; write a list of policies, one for each stage")
    return tuple(_settings(stage, Policy, where=f"{where}: stage {index}") for index, stage in enumerate(stages))


def _read(path: Path, where: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Invalid(f"--policy {where}: {error.strerror}") from None
    except ValueError:
        raise Invalid(f"--policy {where} is not text; write a policy as JSON or TOML") from None
    return _parsed(text, where, is_toml=path.suffix == ".toml")


def _parsed(text: str, where: str, *, is_toml: bool = False) -> Any:
    try:
        return tomllib.loads(text) if is_toml else json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "TOML" if is_toml else "JSON (the name of a TOML file ends with .toml)"
        raise Invalid(f"{where} cannot be read as {what}: {error}") from None


def _settings(found: Any, kind: type, *, where: str) -> Settings:
    if not isinstance(found, dict):
        raise Invalid(f"{where} is {_shown(found)}; write an object of names and values")
    types = get_type_hints(kind)
    for name in found:
        if name not in types:
            raise Invalid(f"{where}: there is no {name!r}; {_nearest(name, types)}")
    return {name: _value(value, types[name], where=f"{where}: {name}") for name, value in found.items()}


def _value(value: Any, kind: type, *, where: str) -> Any:
    if kind is Compression:
        return Compression(**_settings(value, Compression, where=where))
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise Invalid(f"{where} is {_shown(value)}; use {_EXPECTED[kind]}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:80]
