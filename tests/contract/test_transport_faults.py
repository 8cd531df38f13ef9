"""Peers that die, hang, lie or shout, over ZeroMQ."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from asyncpipe.errors import Broken, Invalid, WireError
from asyncpipe.transport.base import Link, LinkOptions
from asyncpipe.transport.credit import Kind
from asyncpipe.wire.handshake import decode_hello, decode_refusal, encode_hello
from tests.contract.transport_peers import (
    CLIENT,
    HEADER,
    OPTIONS,
    Recorder,
    Stranger,
    connect,
    free_name,
    joined,
    listen,
    listen_when_free,
)
from tests.support import run, until

SILENT_AFTER_S = 0.6
FAULT_OPTIONS = replace(OPTIONS, heartbeat_s=0.1, silence_s=SILENT_AFTER_S, handshake_s=20)

# --- death and silence ------------------------------------------------------------------------------------------------

CHILD = """
import asyncio, sys
from tests.contract.transport_peers import CLIENT, OPTIONS, SERVER, Recorder, connect, listen
from dataclasses import replace

async def main(role, address):
    options = replace(OPTIONS, heartbeat_s=0.1, silence_s=20, handshake_s=20)
    if role == "connect":
        (await connect(address, options=options)).start(Recorder())
    else:
        listener, accepted = await listen(address, options=options)
        print(listener.address, flush=True)
        while not accepted:
            await asyncio.sleep(0.01)
        accepted[0].start(Recorder())
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.asynccontextmanager
async def child(role: str, address: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, role, address, stdout=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        assert process.stdout is not None
        await process.stdout.read()


@contextlib.asynccontextmanager
async def link_to_child(role: str, address: str) -> AsyncIterator[tuple[Link, asyncio.subprocess.Process]]:
    """Our end of a link to another process, which connects or listens."""
    if role == "connect":
        listener, accepted = await listen(address, options=FAULT_OPTIONS)
        async with child(role, listener.address) as process:
            await until(lambda: accepted, timeout_s=15)
            yield accepted[0], process
        await listener.close()
    else:
        async with child(role, address) as process:
            assert process.stdout is not None
            real_address = (await process.stdout.readline()).decode().strip()
            link = await connect(real_address, options=FAULT_OPTIONS)
            yield link, process
            await link.close()


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
@pytest.mark.parametrize("role", ["connect", "listen"])
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_peer_is_broken_in_time(scheme: str, role: str, death: signal.Signals) -> None:
    async def scenario() -> None:
        address = f"ipc://@{free_name()}" if scheme == "ipc" else "tcp://127.0.0.1:0"
        async with link_to_child(role, address) as (link, process):
            link.start(receiver := Recorder())
            await link.send([b"hello"], timeout_s=1)
            await asyncio.sleep(0.25)
            assert link.is_open
            process.send_signal(death)
            error = await asyncio.wait_for(receiver.lost, SILENT_AFTER_S + 2.0)
            assert isinstance(error, Broken)
            assert ("silent for" in str(error)) == (death == signal.SIGSTOP)

    run(scenario(), timeout_s=40)


def test_a_killed_listener_is_noticed_at_once() -> None:
    async def scenario() -> None:
        async with link_to_child("listen", f"ipc://@{free_name()}") as (link, process):
            link.start(receiver := Recorder())
            process.kill()
            killed_at_s = time.monotonic()
            assert "its connection ended" in str(await asyncio.wait_for(receiver.lost, 5))
            assert time.monotonic() - killed_at_s < 0.4  # far below the silence that would tell as well

    run(scenario(), timeout_s=40)


def test_a_loop_that_was_away_itself_does_not_blame_its_peers() -> None:
    async def scenario() -> None:
        options = replace(OPTIONS, heartbeat_s=0.05, silence_s=0.3)
        async with joined(f"ipc://@{free_name()}", options=options) as pair:
            time.sleep(0.6)  # noqa: ASYNC251 - blocking the loop is the point
            await asyncio.sleep(0.3)
            assert pair.ours.is_open and pair.theirs.is_open

    run(scenario())


def test_idle_links_stay_up() -> None:
    async def scenario() -> None:
        options = replace(OPTIONS, heartbeat_s=0.05, silence_s=0.2)
        async with joined("tcp://127.0.0.1:0", options=options) as pair:
            await asyncio.sleep(0.8)
            assert pair.ours.is_open and pair.theirs.is_open

    run(scenario())


def test_closing_while_the_peer_closes_never_hangs() -> None:
    async def scenario() -> None:
        listener, accepted = await listen(f"ipc://@{free_name()}")
        for _ in range(200):
            link = await connect(listener.address)
            await until(lambda: accepted)
            await asyncio.gather(accepted.pop().close(), link.close())
        await listener.close()

    run(scenario())


def test_closing_while_the_listener_goes_away_never_hangs() -> None:
    async def scenario() -> None:
        for _ in range(30):
            listener, _ = await listen(f"ipc://@{free_name()}")
            link = await connect(listener.address)
            await listener.close()
            time.sleep(0.001)  # noqa: ASYNC251 - so that ZeroMQ's thread closes first
            await link.close()

    run(scenario())


def test_a_listener_that_closes_without_an_answer_may_have_a_successor() -> None:
    """As when a coordinator is started anew: the one before has still heard who greets it."""

    async def scenario() -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as before:
            port = before.bind_to_random_port("tcp://127.0.0.1")
            connecting = asyncio.create_task(connect(f"tcp://127.0.0.1:{port}"))
            await until(lambda: before.poll(0))
            before.close(linger=0)
        listener, accepted = await listen_when_free(f"tcp://127.0.0.1:{port}", OPTIONS)
        link = await connecting
        assert len(accepted) == 1
        await link.close()
        await listener.close()

    run(scenario())


# --- strangers --------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def beside_an_honest_link(options: LinkOptions = FAULT_OPTIONS) -> AsyncIterator[tuple[str, list[Link]]]:
    """A listener's address and links; at the end, the honest link that was there all the time must still work."""
    async with joined(f"ipc://@{free_name()}", options=options) as pair:
        accepted: list[Link] = []
        pair.listener._on_link = accepted.append  # type: ignore[attr-defined]
        yield pair.listener.address, accepted
        await pair.ours.send([b"still here"], timeout_s=1)
        await pair.their_receiver.has(1)
        assert pair.ours.is_open and pair.theirs.is_open


HELLO_HEADER = HEADER.pack(Kind.HELLO, 0)


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"garbage"],
        [b"", b"", b""],
        [HEADER.pack(Kind.DATA, 0), b"data before hello"],
        [HEADER.pack(Kind.CREDIT, 5)],
        [HEADER.pack(255, 0)],
        [HELLO_HEADER],
        [HELLO_HEADER, b""],
        [HELLO_HEADER, b"\xc1" * 100],
        [HELLO_HEADER, b"x" * 100_000],
        [HELLO_HEADER, encode_hello(CLIENT), b"another frame"],
        [HELLO_HEADER, encode_hello(CLIENT)[:-3]],
        [b"x" * 200_000, b"y" * 200_000],
    ],
)
def test_garbage_before_hello_is_refused_and_harms_nobody(frames: list[bytes]) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link() as (address, accepted):
            with Stranger(address) as stranger:
                stranger.say(*frames)
                assert decode_refusal((await stranger.hear(Kind.REFUSE))[0])
                assert accepted == []
                stranger.say_hello()
                assert decode_hello((await stranger.hear(Kind.WELCOME))[0]).node == "node-s"

    run(scenario())


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([b""], "unknown kind 0"),
        ([b"garbage header"], "unknown kind 0"),
        ([HEADER.pack(99, 0), b"x"], "unknown kind 99"),
        ([HELLO_HEADER, encode_hello(CLIENT)], "unknown kind 1"),
        ([HEADER.pack(Kind.DATA, 0)], "a message of 0 frames"),
        ([HEADER.pack(Kind.DATA, 0), *([b"x"] * 67)], "a message of 67 frames"),
        ([HEADER.pack(Kind.CONTROL, 0), *([b"x"] * 67)], "a message of 67 frames"),
        ([HEADER.pack(Kind.CREDIT, 0)], "granted 0 credits"),
        ([HEADER.pack(Kind.CREDIT, 2**32 - 1)], "granted 4294967295 credits"),
        ([HEADER.pack(Kind.RELEASE, 1)], "unknown kind 12"),
        ([HEADER.pack(Kind.SEGMENT, 3)], "unknown kind 10"),
        ([HEADER.pack(Kind.SHARED_DATA, 0), b"x" * 26], "unknown kind 13"),
    ],
)
def test_garbage_after_hello_ends_that_link_only_and_is_logged_once(
    frames: list[bytes], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link() as (address, accepted):
            with Stranger(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                accepted[0].start(receiver := Recorder())
                stranger.say(*frames)
                error = await asyncio.wait_for(receiver.lost, 5)
                assert isinstance(error, WireError) and complaint in str(error)
                assert complaint in decode_refusal((await stranger.hear(Kind.REFUSE))[0])
                stranger.say(HEADER.pack(Kind.DATA, 0), b"it goes on talking")
                await stranger.hear(Kind.REFUSE)

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert [complaint in record.getMessage() for record in caplog.records] == [True]


def test_a_peer_that_ignores_its_credits_loses_its_link() -> None:
    async def scenario() -> None:
        async with beside_an_honest_link() as (address, accepted):
            with Stranger(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                accepted[0].start(receiver := Recorder(holds=True))
                for _ in range(5):
                    stranger.say(HEADER.pack(Kind.DATA, 0), b"x")
                error = await asyncio.wait_for(receiver.lost, 5)
                assert isinstance(error, WireError) and "more than its window of 4" in str(error)
                assert len(receiver.deliveries) == 4

    run(scenario())


def test_a_flood_before_start_ends_the_link_instead_of_filling_memory() -> None:
    async def scenario() -> None:
        options = replace(FAULT_OPTIONS, control_window=10)
        async with beside_an_honest_link(options) as (address, accepted):
            with Stranger(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                for _ in range(100):
                    stranger.say(HEADER.pack(Kind.CONTROL, 0), b"x")
                await until(lambda: not accepted[0].is_open)
                assert accepted[0].statistics().received_messages < 20

    run(scenario())


def test_a_frame_beyond_the_limit_cuts_its_sender_off_and_nobody_else() -> None:
    async def scenario() -> None:
        options = replace(FAULT_OPTIONS, max_frame_bytes=10_000)
        async with beside_an_honest_link(options) as (address, accepted):
            with Stranger(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                accepted[0].start(receiver := Recorder())
                stranger.say(HEADER.pack(Kind.DATA, 0), b"x" * 10_001)
                assert isinstance(await asyncio.wait_for(receiver.lost, 5), Broken)
                assert receiver.deliveries == []

    run(scenario())


def test_a_receiver_with_a_bug_does_not_stop_the_messages_of_others() -> None:
    class Faulty(Recorder):
        def on_delivery(self, *_: object) -> None:
            raise RuntimeError("a bug")

    async def scenario() -> None:
        reported: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
        async with beside_an_honest_link() as (address, accepted):
            faulty = await connect(address, hello=replace(CLIENT, node="node-f"), options=FAULT_OPTIONS)  # type: ignore[arg-type]
            await until(lambda: accepted)
            accepted[0].start(Faulty())
            for _ in range(3):
                faulty.send_control([b"x"])
            await until(lambda: len(reported) == 3)
            assert reported == ["a bug"] * 3
            await faulty.close()

    run(scenario())


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.168.1.7:5550", "tcp://127.evil.example:1", "tcp://[::]:0"]
)
def test_only_loopback_may_be_bound_without_keys(address: str) -> None:
    with pytest.raises(Invalid, match=r"needs CURVE keys: make them with .* keygen, or bind tcp://127\.0\.0\.1:PORT"):
        run(listen(address))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "tcp://127.0.0.1:99999", "ipc:///no/such/directory/x"])
def test_an_address_that_cannot_be_bound_is_one_clear_line(address: str) -> None:
    with pytest.raises(Invalid) as caught:
        run(listen(address))
    assert address in str(caught.value) and "\n" not in str(caught.value)


def test_port_zero_becomes_a_real_port_also_by_name() -> None:
    async def scenario() -> None:
        listener, _ = await listen("tcp://localhost:0")
        assert int(listener.address.rpartition(":")[2]) > 0
        await (await connect(listener.address)).close()
        await listener.close()

    run(scenario())


def test_a_socket_file_is_removed_and_strangers_files_are_not_touched(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "socket"
        listener, _ = await listen(f"ipc://{path}")
        assert path.is_socket()
        with pytest.raises(Invalid, match="is already in use"):
            await listen(f"ipc://{path}")
        await (await connect(listener.address)).close()
        await listener.close()
        assert not path.exists()
        path.write_text("precious")
        with pytest.raises(Invalid, match="exists and is not a socket"):
            await listen(f"ipc://{path}")
        assert path.read_text() == "precious"

    run(scenario())
