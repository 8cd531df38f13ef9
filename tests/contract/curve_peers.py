"""What the CURVE tests share: keys for both ends, a wire that can be listened in on, and raw TCP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from asyncpipe.transport.base import LinkOptions
from asyncpipe.transport.credit import Kind
from asyncpipe.transport.keys import KeyPair, Keys
from tests.contract.transport_peers import HEADER, OPTIONS

LOCALHOST = "127.0.0.1"
READ_BYTES = 65_536
LAST_WORDS_S = 5.0
CURVE_OPTIONS = replace(OPTIONS, shared_memory=False, handshake_s=20)

CURVE_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
NOISE = hashlib.shake_256(b"noise").digest(4096)
GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10,
    "noise": NOISE,
    "zeros": bytes(4096),
    "a greeting and noise": CURVE_GREETING + b"\x04\xc8" + NOISE,
    "a greeting and a false hello": CURVE_GREETING + b"\x04\xc8\x05HELLO\x01\x00" + NOISE[:192],
    "a greeting and data": CURVE_GREETING + b"\x00\x05" + HEADER.pack(Kind.HELLO, 0),
}

COORDINATOR, WORKER, CLIENT_PAIR, STRANGER = (KeyPair.new() for _ in range(4))


def coordinators_options() -> LinkOptions:
    """Of a listener that allows one worker and one client."""
    allowed = {WORKER.public: frozenset({"worker"}), CLIENT_PAIR.public: frozenset({"client"})}
    return replace(CURVE_OPTIONS, keys=Keys(COORDINATOR, allowed=allowed))


def options_of(own: KeyPair, *, server_key: str | None = None) -> LinkOptions:
    """Of a connector to it."""
    return replace(CURVE_OPTIONS, keys=Keys(own, coordinator=COORDINATOR.public), server_key=server_key)


@dataclass
class Recording:
    """What went over a tapped wire, each way."""

    address: str
    sent: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)


@contextlib.asynccontextmanager
async def tapped(address: str) -> AsyncIterator[Recording]:
    """A wire to the listener at `address`: whoever connects to the recording's address is passed on there, and recorded.

    Their connections are to be closed within the block.
    """
    connections: set[asyncio.Task[None]] = set()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        there_reader, there_writer = await asyncio.open_connection(LOCALHOST, port_of(address))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(
                    _pass_on(reader, there_writer, recording.sent), _pass_on(there_reader, writer, recording.answered)
                )
        finally:
            there_writer.close()
            writer.close()

    server = await asyncio.start_server(on_connection, LOCALHOST, 0)
    recording = Recording(f"tcp://{LOCALHOST}:{server.sockets[0].getsockname()[1]}")
    try:
        yield recording
    finally:
        server.close()
        if connections:
            await asyncio.wait(connections, timeout=LAST_WORDS_S)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(READ_BYTES):
            record += data
            writer.write(data)
            await writer.drain()
    writer.close()


async def say_raw(address: str, data: bytes, *, and_leave: bool = False) -> None:
    """Send `data` over a plain TCP connection, and wait until the listener ends it, or leave at once."""
    reader, writer = await asyncio.open_connection(LOCALHOST, port_of(address))
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            while not and_leave and await reader.read(READ_BYTES):
                pass
    finally:
        writer.close()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])
