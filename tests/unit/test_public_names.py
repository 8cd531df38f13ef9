"""The names that users import are a contract."""

from __future__ import annotations

import asyncpipe
import asyncpipe.actors


def test_the_public_names_of_asyncpipe_are_these() -> None:
    assert sorted(asyncpipe.__all__) == [
        "AsyncPipeError",
        "Broken",
        "Busy",
        "Choice",
        "Client",
        "Closed",
        "Compression",
        "Generation",
        "Invalid",
        "Placement",
        "Policy",
        "Refused",
        "RemoteError",
        "StageLost",
        "TextPiece",
        "TextStream",
        "Timeout",
        "WireError",
        "__version__",
        "connect",
        "local",
    ]
    assert all(hasattr(asyncpipe, name) for name in asyncpipe.__all__)


def test_the_public_names_of_the_actor_runtime_are_these() -> None:
    assert sorted(asyncpipe.actors.__all__) == [
        "Actor",
        "ActorRef",
        "ActorSystem",
        "Down",
        "MailboxStatistics",
        "RestartPolicy",
        "SystemStatistics",
        "TensorPort",
    ]
