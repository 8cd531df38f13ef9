"""Peers that die, hang, lie or shout, over ZeroMQ and over Unix-domain sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from asyncpipe.errors import Broken, Invalid, Timeout, WireError
from asyncpipe.transport import unix
from asyncpipe.transport.base import Link, LinkOptions
from asyncpipe.transport.credit import Kind
from asyncpipe.wire.handshake import decode_hello, decode_refusal, encode_hello
from tests.contract.transport_peers import (
    CLIENT,
    HEADER,
    OPTIONS,
    Recorder,
    UnixStranger,
    connect,
    free_name,
    joined,
    listen,
    listen_when_free,
    stranger_at,
)
from tests.support import run, until

SILENT_AFTER_S = 0.6
FAULT_OPTIONS = replace(OPTIONS, heartbeat_s=0.1, silence_s=SILENT_AFTER_S, handshake_s=20)

schemes = pytest.mark.parametrize("scheme", ["ipc", "tcp"])


def address_of(scheme: str) -> str:
    return f"ipc://@{free_name()}" if scheme == "ipc" else "tcp://127.0.0.1:0"


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


@schemes
@pytest.mark.parametrize("role", ["connect", "listen"])
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_peer_is_broken_in_time(scheme: str, role: str, death: signal.Signals) -> None:
    async def scenario() -> None:
        async with link_to_child(role, address_of(scheme)) as (link, process):
            link.start(receiver := Recorder())
            await link.send([b"hello"], timeout_s=1)
            await asyncio.sleep(0.25)
            assert link.is_open
            process.send_signal(death)
            error = await asyncio.wait_for(receiver.lost, SILENT_AFTER_S + 2.0)
            assert isinstance(error, Broken)
            assert ("silent for" in str(error)) == (death == signal.SIGSTOP)

    run(scenario(), timeout_s=40)


@pytest.mark.parametrize(("scheme", "role"), [("ipc", "listen"), ("ipc", "connect"), ("tcp", "listen")])
def test_a_killed_peer_is_noticed_before_its_silence_is(scheme: str, role: str) -> None:
    """Not by who listens over ZeroMQ, which does not tell."""

    async def scenario() -> None:
        async with link_to_child(role, address_of(scheme)) as (link, process):
            link.start(receiver := Recorder())
            process.kill()
            assert "its connection ended" in str(await asyncio.wait_for(receiver.lost, 5))

    run(scenario(), timeout_s=40)


@schemes
def test_a_loop_that_was_away_itself_does_not_blame_its_peers(scheme: str) -> None:
    async def scenario() -> None:
        options = replace(OPTIONS, heartbeat_s=0.05, silence_s=0.3)
        async with joined(address_of(scheme), options=options) as pair:
            time.sleep(0.6)  # noqa: ASYNC251 - blocking the loop is the point
            await asyncio.sleep(0.3)
            assert pair.ours.is_open and pair.theirs.is_open

    run(scenario())


@schemes
def test_idle_links_stay_up(scheme: str) -> None:
    async def scenario() -> None:
        options = replace(OPTIONS, heartbeat_s=0.05, silence_s=0.2)
        async with joined(address_of(scheme), options=options) as pair:
            await asyncio.sleep(0.8)
            assert pair.ours.is_open and pair.theirs.is_open

    run(scenario())


@schemes
def test_closing_while_the_peer_closes_never_hangs(scheme: str) -> None:
    async def scenario() -> None:
        listener, accepted = await listen(address_of(scheme))
        for _ in range(200):
            link = await connect(listener.address)
            await until(lambda: accepted)
            await asyncio.gather(accepted.pop().close(), link.close())
        await listener.close()

    run(scenario())


@schemes
def test_closing_while_the_listener_goes_away_never_hangs(scheme: str) -> None:
    async def scenario() -> None:
        for _ in range(30):
            listener, _ = await listen(address_of(scheme))
            link = await connect(listener.address)
            await listener.close()
            time.sleep(0.001)  # noqa: ASYNC251 - so that ZeroMQ's thread closes first
            await link.close()

    run(scenario())


def test_a_socket_that_closes_without_an_answer_may_have_a_successor() -> None:
    async def scenario() -> None:
        name = free_name()
        with socket.socket(socket.AF_UNIX) as before:
            before.bind(f"\0{name}")
            before.listen()
            before.setblocking(False)
            connecting = asyncio.create_task(connect(f"ipc://@{name}"))
            greeted, _ = await asyncio.get_running_loop().sock_accept(before)
            assert await asyncio.get_running_loop().sock_recv(greeted, 1)
            greeted.close()
        listener, accepted = await listen(f"ipc://@{name}")
        link = await connecting
        assert len(accepted) == 1
        await link.close()
        await listener.close()

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
async def beside_an_honest_link(scheme: str, options: LinkOptions = FAULT_OPTIONS) -> AsyncIterator[tuple[str, list[Link]]]:
    """A listener's address and links; at the end, the honest link that was there all the time must still work."""
    async with joined(address_of(scheme), options=options) as pair:
        accepted: list[Link] = []
        pair.listener._on_link = accepted.append  # type: ignore[attr-defined]
        yield pair.listener.address, accepted
        await pair.ours.send([b"still here"], timeout_s=1)
        await pair.their_receiver.has(1)
        assert pair.ours.is_open and pair.theirs.is_open


HELLO_HEADER = HEADER.pack(Kind.HELLO, 0)


@schemes
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
def test_garbage_before_hello_is_refused_and_harms_nobody(scheme: str, frames: list[bytes]) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link(scheme) as (address, accepted):
            with stranger_at(address) as stranger:
                stranger.say(*frames)
                assert decode_refusal((await stranger.hear(Kind.REFUSE))[0])
                assert accepted == []
            with stranger_at(address) as stranger:
                stranger.say_hello()
                assert decode_hello((await stranger.hear(Kind.WELCOME))[0]).node == "node-s"

    run(scenario())


@schemes
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
    scheme: str, frames: list[bytes], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link(scheme) as (address, accepted):
            with stranger_at(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                accepted[0].start(receiver := Recorder())
                stranger.say(*frames)
                error = await asyncio.wait_for(receiver.lost, 5)
                assert isinstance(error, WireError) and complaint in str(error)
                assert complaint in decode_refusal((await stranger.hear(Kind.REFUSE))[0])
                stranger.say(HEADER.pack(Kind.DATA, 0), b"it goes on talking")
                if isinstance(stranger, UnixStranger):
                    await until(lambda: stranger.heard() == [] and stranger.is_cut_off)
                else:
                    await stranger.hear(Kind.REFUSE)

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert [complaint in record.getMessage() for record in caplog.records] == [True]


@schemes
def test_a_peer_that_ignores_its_credits_loses_its_link(scheme: str) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link(scheme) as (address, accepted):
            with stranger_at(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                accepted[0].start(receiver := Recorder(holds=True))
                for _ in range(5):
                    stranger.say(HEADER.pack(Kind.DATA, 0), b"x")
                error = await asyncio.wait_for(receiver.lost, 5)
                assert isinstance(error, WireError) and "more than its window of 4" in str(error)
                assert len(receiver.deliveries) == 4

    run(scenario())


@schemes
def test_a_flood_before_start_ends_the_link_instead_of_filling_memory(scheme: str) -> None:
    async def scenario() -> None:
        options = replace(FAULT_OPTIONS, control_window=10)
        async with beside_an_honest_link(scheme, options) as (address, accepted):
            with stranger_at(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                for _ in range(100):
                    stranger.say(HEADER.pack(Kind.CONTROL, 0), b"x")
                await until(lambda: not accepted[0].is_open)
                assert accepted[0].statistics().received_messages < 20

    run(scenario())


@schemes
def test_a_frame_beyond_the_limit_cuts_its_sender_off_and_nobody_else(scheme: str) -> None:
    async def scenario() -> None:
        options = replace(FAULT_OPTIONS, max_frame_bytes=10_000)
        async with beside_an_honest_link(scheme, options) as (address, accepted):
            with stranger_at(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                accepted[0].start(receiver := Recorder())
                stranger.say(HEADER.pack(Kind.DATA, 0), b"x" * 10_001)
                assert isinstance(await asyncio.wait_for(receiver.lost, 5), Broken | WireError)
                assert receiver.deliveries == []

    run(scenario())


@schemes
def test_a_receiver_with_a_bug_does_not_stop_the_messages_of_others(scheme: str) -> None:
    class Faulty(Recorder):
        def on_delivery(self, *_: object) -> None:
            raise RuntimeError("a bug")

    async def scenario() -> None:
        reported: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
        async with beside_an_honest_link(scheme) as (address, accepted):
            faulty = await connect(address, hello=replace(CLIENT, node="node-f"), options=FAULT_OPTIONS)  # type: ignore[arg-type]
            await until(lambda: accepted)
            accepted[0].start(Faulty())
            for _ in range(3):
                faulty.send_control([b"x"])
            await until(lambda: len(reported) == 3)
            assert reported == ["a bug"] * 3
            await faulty.close()

    run(scenario())


# --- strangers on a socket of this machine ---


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0" * 64, HEADER.pack(Kind.HELLO, 0) * 20])
def test_bytes_that_are_no_messages_are_refused_and_cut_off(garbage: bytes) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link("ipc") as (address, accepted):
            with UnixStranger(address) as stranger:
                stranger.say_bytes(garbage)
                assert "frame" in decode_refusal((await stranger.hear(Kind.REFUSE))[0])
                await until(lambda: stranger.heard() == [] and stranger.is_cut_off)
            assert accepted == []

    run(scenario())


def test_bytes_that_are_no_messages_end_a_link_and_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link("ipc") as (address, accepted):
            with UnixStranger(address) as stranger:
                stranger.say_hello()
                await stranger.hear(Kind.WELCOME)
                accepted[0].start(receiver := Recorder())
                stranger.say(HEADER.pack(Kind.DATA, 0), b"before")
                stranger.say_bytes(b"\xff" * 64)
                error = await asyncio.wait_for(receiver.lost, 5)
                assert isinstance(error, WireError) and "worker node-c sent a message of 4294967295 frames" in str(error)
                assert receiver.bodies() == [[b"before"]]
                assert "4294967295" in decode_refusal((await stranger.hear(Kind.REFUSE))[0])

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert ["4294967295" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("beginning", [b"", b"\x02\0", HEADER.pack(Kind.HELLO, 0)[:3]])
def test_who_says_no_hello_is_cut_off_in_time(beginning: bytes) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link("ipc", replace(FAULT_OPTIONS, handshake_s=0.5)) as (address, accepted):
            with UnixStranger(address) as stranger:
                stranger.say_bytes(beginning)
                await asyncio.sleep(0.2)
                assert stranger.heard() == [] and not stranger.is_cut_off
                assert "no Hello within 0.5 s" in decode_refusal((await stranger.hear(Kind.REFUSE))[0])
                await until(lambda: stranger.heard() == [] and stranger.is_cut_off)
            assert accepted == []

    run(scenario())


def test_no_more_connections_are_held_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix, "MAX_CONNECTIONS", 2)  # the honest link is one of them

    async def scenario() -> None:
        async with beside_an_honest_link("ipc") as (address, _):
            with UnixStranger(address) as first:
                first.say_hello()
                await first.hear(Kind.WELCOME)
                with UnixStranger(address) as second:
                    await until(lambda: second.heard() == [] and second.is_cut_off)
            with contextlib.suppress(Timeout):
                while True:  # until it is noticed that the first has left
                    async with asyncio.timeout(5):
                        await (await connect(address, options=FAULT_OPTIONS)).close()
                    break

    run(scenario())


def test_a_listener_without_descriptors_accepts_when_there_are_some(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with beside_an_honest_link("ipc") as (address, _):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            with UnixStranger(address) as stranger:
                stranger.say_hello()
                try:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (stranger.fileno(), hard))
                    await until(lambda: caplog.records)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                await stranger.hear(Kind.WELCOME)

    run(scenario())
    assert "cannot accept a peer" in caplog.text


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.168.1.7:5550", "tcp://127.evil.example:1", "tcp://[::]:0"]
)
def test_only_loopback_may_be_bound_without_keys(address: str) -> None:
    with pytest.raises(Invalid, match=r"needs CURVE keys: make them with .* keygen, or bind tcp://127\.0\.0\.1:PORT"):
        run(listen(address))


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1", "tcp://127.0.0.1:99999", "ipc:///no/such/directory/x", f"ipc:///tmp/{'x' * 200}"]
)
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
        with socket.socket(socket.AF_UNIX) as killed:  # whose file nobody has removed
            killed.bind(str(path))
        listener, _ = await listen(f"ipc://{path}")
        await (await connect(listener.address)).close()
        await listener.close()
        path.write_text("precious")
        with pytest.raises(Invalid, match="exists and is not a socket"):
            await listen(f"ipc://{path}")
        assert path.read_text() == "precious"

    run(scenario())
