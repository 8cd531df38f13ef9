"""asyncpipe: an asyncio message-passing actor runtime, and pipeline-parallel LLM inference on it.

    async with asyncpipe.local("model-dir", stages=2) as client:
        result = await client.generate("Once upon", max_new_tokens=32)

The actor runtime by itself is in `asyncpipe.actors`.
"""

from asyncpipe.client import Choice, Client, Generation, TextPiece, TextStream, connect, local
from asyncpipe.errors import (
    AsyncPipeError,
    Broken,
    Busy,
    Closed,
    Invalid,
    Refused,
    RemoteError,
    StageLost,
    Timeout,
    WireError,
)
from asyncpipe.policy import Compression, Placement, Policy

__version__ = "0.1.0"

__all__ = [
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
