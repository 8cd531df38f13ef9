"""The async client library: needs neither torch nor the model."""

from asyncpipe.client.client import Client, connect
from asyncpipe.client.local import local
from asyncpipe.client.results import Generation, TextPiece
from asyncpipe.client.sampling import SamplingOptions
from asyncpipe.client.stream import TextStream

__all__ = ["Client", "Generation", "SamplingOptions", "TextPiece", "TextStream", "connect", "local"]
