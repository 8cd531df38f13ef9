"""The argument parser, in which every flag is also an environment variable, and the types of flags' values."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

ENV_PREFIX = "ASYNCPIPE_"
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose every option takes its default from the environment and says so in its help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._switches: set[str] = set()

    def option(self, flag: str, *, env: Mapping[str, str] = os.environ, **settings: Any) -> None:
        """`add_argument` for `flag`; the environment's text goes through the flag's own `type`."""
        variable = ENV_PREFIX + flag.lstrip("-").replace("-", "_").upper()
        if settings.get("action") == "store_true":
            settings["default"] = env.get(variable, "").lower() in ("1", "true", "yes")
        elif variable in env:
            settings["default"] = _default(env[variable], settings)
        settings["help"] = f"{settings['help']} [{variable}]"
        self.add_argument(flag, **settings)

    def switch(self, flag: str, *, help: str, env: Mapping[str, str] = os.environ) -> None:
        """An option that is true when it is given alone, before whatever follows, and else takes true or false."""
        self._switches.add(flag)
        self.option(flag, env=env, nargs="?", const=True, type=boolean, metavar="true|false", help=help)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        return super().parse_known_args(list(self._spelled_out(sys.argv[1:] if args is None else args)), namespace)

    def error(self, message: str) -> NoReturn:
        """One line: with so many flags, their usage would hide it."""
        self.exit(2, f"{self.prog.split()[0]}: error: {message} (flags: {self.prog} --help)\n")

    def _spelled_out(self, args: Sequence[str]) -> Iterator[str]:
        """`--compress-weight MODEL` as `--compress-weight=true MODEL`: argparse would take MODEL for the flag's value."""
        for index, text in enumerate(args):
            if text == "--":
                yield from args[index:]
                return
            following = args[index + 1] if index + 1 < len(args) else ""
            is_alone = self._is_switch(text) and following.lower() not in BOOLEANS
            yield f"{text}=true" if is_alone else text

    def _is_switch(self, text: str) -> bool:
        """Also abbreviated, when just one flag begins so."""
        if not text.startswith("--") or text in self._option_string_actions:
            return text in self._switches
        matching = {flag for flag in self._option_string_actions if flag.startswith(text)}
        return len(matching) == 1 and matching <= self._switches


def _default(value: str, settings: Mapping[str, Any]) -> str | list[str]:
    if settings.get("action") == "append":
        return value.split("\n")
    return value.split() if isinstance(settings.get("nargs"), int) else value


def boolean(text: str) -> bool:
    """The value of a switch."""
    try:
        return BOOLEANS[text.strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false") from None


def size_bytes(text: str) -> int:
    """The value of a size: "512MiB", "2GB", "1.5GiB", or plain bytes."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)(i?)b?", text.strip().lower())
    try:
        number = float(found[1]) if found else -1.0
    except ValueError:
        number = -1.0
    if found is None or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: write a size like 512MiB or 2GiB")
    return int(number * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def token_ids(text: str) -> tuple[int, ...]:
    """The value of --stop-token-ids."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write token ids like 2,50256") from None


def token_biases(text: str) -> dict[int, float]:
    """The value of --logit-bias."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write token ids and biases like 5:-100,7:2.5") from None


def layer_counts(text: str) -> tuple[int, ...]:
    """The value of --split."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write layer counts like 5,4,3") from None
