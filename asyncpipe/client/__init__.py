"""The async client library: needs neither torch nor the model."""

from asyncpipe.client.client import Client, connect
from asyncpipe.client.local import local
from asyncpipe.client.results import Choice, Generation, TextPiece
from asyncpipe.client.sampling import SamplingOptions
from asyncpipe.client.stream import TextStream

__all__ = ["Choice", "Client", "Generation", "SamplingOptions", "TextPiece", "TextStream", "connect", "local"]
