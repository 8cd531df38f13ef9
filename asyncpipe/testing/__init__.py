"""Fakes for tests of code that is built on asyncpipe."""

from asyncpipe.testing.clock import FakeClock

__all__ = ["FakeClock"]
