"""Flags that benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def some_of(parser: argparse.ArgumentParser, flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The names that `text` lists; one that is not known ends the program, with a clear line."""
    names, known = text.split(","), list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{flag} {','.join(unknown)}: use some of {', '.join(known)}")
    return names
