"""The `keygen` command: makes CURVE keys, for links between machines, and says what belongs where."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec

from asyncpipe.transport.key_files import COORDINATOR, DEFAULT_NAME, KeyFiles, KeyName, make_keys

DEFAULT_DIRECTORY = "asyncpipe-keys"

KEYGEN_EPILOG = """examples:
  asyncpipe-coordinator keygen                               a coordinator's key, a worker's and a client's, in ./asyncpipe-keys
  asyncpipe-coordinator keygen /etc/asyncpipe/keys --json
  asyncpipe-coordinator keygen --worker gpu1 --worker gpu2   one more key for each of these
  asyncpipe-coordinator keygen --client alice

Each machine gets the files that the output names, and is told where they are with --keys DIR or ASYNCPIPE_KEYS. A worker or
client may also make its key itself: then only its .key travels, to the coordinator's machine.
"""


def keygen(arguments: argparse.Namespace) -> int:
    """Raises Invalid, before anything is written, for a key that exists already or cannot be named so."""
    directory = Path(arguments.directory).expanduser()
    made = make_keys(directory, _wanted(workers=arguments.worker or [], clients=arguments.client or []))
    if arguments.json:
        print(msgspec.json.encode(_result(directory, made)).decode())
    else:
        print("\n".join(_lines(directory, made)))
    return 0


def _wanted(*, workers: list[str], clients: list[str]) -> list[KeyName]:
    if not workers and not clients:
        return [KeyName(COORDINATOR, COORDINATOR), KeyName("worker", DEFAULT_NAME), KeyName("client", DEFAULT_NAME)]
    return [*(KeyName("worker", name) for name in workers), *(KeyName("client", name) for name in clients)]


def _result(directory: Path, made: list[KeyFiles]) -> dict[str, Any]:
    """Public information only."""
    return {
        "directory": str(directory),
        "keys": [
            {
                "role": files.key.role,
                "name": files.key.name,
                "public_key": files.public,
                "public_file": str(files.public_file),
                "secret_file": str(files.secret_file),
                "copy": _needed(files, directory),
            }
            for files in made
        ],
    }


def _needed(files: KeyFiles, directory: Path) -> list[str]:
    """What the machine of this key must have, relative to `directory`."""
    own = str(files.secret_file.relative_to(directory))
    return [own, "workers/*.key", "clients/*.key"] if files.key.role == COORDINATOR else [own, f"{COORDINATOR}.key"]


def _lines(directory: Path, made: list[KeyFiles]) -> list[str]:
    """For people."""
    return [
        *(f"made {files.secret_file} and {files.public_file.name} ({_title(files)})" for files in made),
        "what each machine needs, in a directory of its own:",
        *(f"  {_title(files)}: {', '.join(_needed(files, directory))}" for files in made),
        *(
            []
            if made[0].key.role == COORDINATOR
            else [f"  coordinator: {', '.join(_new_public(directory, made))}, in addition"]
        ),
        "tell it where with --keys DIR or ASYNCPIPE_KEYS; a .key_secret stays on the one machine that it is for",
    ]


def _new_public(directory: Path, made: list[KeyFiles]) -> list[str]:
    return [str(files.public_file.relative_to(directory)) for files in made]


def _title(files: KeyFiles) -> str:
    return files.key.role if files.key.role == COORDINATOR else f"{files.key.role} {files.key.name}"
