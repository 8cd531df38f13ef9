"""Flags that benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

MAX_BATCH = 128


def some_of(parser: argparse.ArgumentParser, flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The names that `text` lists; one that is not known ends the program, with a clear line."""
    names, known = text.split(","), list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{flag} {','.join(unknown)}: use some of {', '.join(known)}")
    return names


def batch_sizes(text: str) -> list[int]:
    """For `type=` of an argument: those that it lists, in ascending order."""
    try:
        batches = sorted({int(number) for number in text.split(",")})
    except ValueError:
        batches = []
    if not batches or not 1 <= batches[0] <= batches[-1] <= MAX_BATCH:
        raise argparse.ArgumentTypeError(f"{text}: use numbers from 1 to {MAX_BATCH}, like 1,8,32")
    return batches


def existing_folder(text: str) -> Path:
    """For `type=` of an argument: one that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder; make it first, or leave this out")
    return path
