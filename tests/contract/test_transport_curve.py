"""tcp with keys: who may come in, as what, and what others can hear. Every stranger here is hostile."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from zmq.auth.thread import AuthenticationThread

import asyncpipe
from asyncpipe.actors import Actor, ActorSystem
from asyncpipe.errors import Invalid, Refused, Timeout
from asyncpipe.transport.base import Link, LinkOptions
from asyncpipe.transport.credit import Kind
from asyncpipe.transport.curve import MAX_CUT_HANDSHAKES
from asyncpipe.transport.key_files import KeyName, make_keys
from asyncpipe.transport.keys import KeyPair, Keys, load_keys
from asyncpipe.transport.refusals import FORGET_AFTER_S, MAX_REFUSALS, RefusalLog
from asyncpipe.wire.handshake import Hello, encode_hello
from tests.contract.curve_peers import (
    CLIENT_PAIR,
    COORDINATOR,
    CURVE_GREETING,
    CURVE_OPTIONS,
    GARBAGE,
    LOCALHOST,
    STRANGER,
    WORKER,
    coordinators_options,
    options_of,
    port_of,
    say_raw,
    tapped,
)
from tests.contract.transport_peers import (
    CLIENT,
    HEADER,
    Recorder,
    ZmqStranger,
    connect,
    free_name,
    joined,
    listen,
    num_open_files,
)
from tests.support import run, until

ANY_PORT = "tcp://127.0.0.1:0"
ATTEMPTS = 3
FLOOD = 2500  # more events than ZeroMQ keeps by default


@contextlib.asynccontextmanager
async def guarded(options: LinkOptions | None = None) -> AsyncIterator[tuple[str, list[Link]]]:
    """A listener's address and the links of those who come later; a worker's link must work from before to after."""
    listener, links = await listen(ANY_PORT, options=options or coordinators_options())
    ours = await connect(listener.address, options=options_of(WORKER))
    await until(lambda: links)
    theirs = links.pop()
    theirs.start(receiver := Recorder())
    yield listener.address, links
    await ours.send([b"still here"], timeout_s=5)
    assert await receiver.has(1) == [[b"still here"]]
    await ours.close()
    await listener.close()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- who is allowed ---------------------------------------------------------------------------------------------------


def test_an_allowed_key_talks_and_both_ends_know_whose_it_is(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with guarded() as (address, links):
            link = await connect(address, hello=replace(CLIENT, role="client"), options=options_of(CLIENT_PAIR))
            await until(lambda: links)
            links[0].start(receiver := Recorder())
            await link.send([b"hello", b"x" * 100_000], timeout_s=5)
            assert await receiver.has(1) == [[b"hello", b"x" * 100_000]]
            assert (links[0].remote.role, links[0].peer_key) == ("client", CLIENT_PAIR.public)
            assert link.peer_key == COORDINATOR.public
            await link.close()

    run(scenario())
    assert warnings_in(caplog) == []


def test_a_key_may_be_allowed_and_disallowed_while_listening() -> None:
    async def scenario() -> None:
        options = coordinators_options()
        assert options.keys is not None
        async with guarded(options) as (address, links):
            options.keys.allow(STRANGER.public, "worker")
            link = await connect(address, options=options_of(STRANGER))
            await until(lambda: links)
            options.keys.disallow(STRANGER.public)
            with pytest.raises(Refused, match="is not allowed there"):
                await connect(address, options=options_of(STRANGER))
            assert link.is_open
            await link.close()

    run(scenario())


def test_a_system_connects_to_another_one_whose_key_it_was_told() -> None:
    """As a worker does to the next one, each having heard of the other's key from the coordinator."""

    class Echo(Actor):
        async def receive(self, message: object, /) -> object:
            return message

    async def scenario() -> None:
        theirs = Keys(WORKER, coordinator=COORDINATOR.public)
        async with (
            ActorSystem("next", role="worker", options=replace(CURVE_OPTIONS, keys=theirs)) as system,
            ActorSystem("previous", role="worker", options=options_of(STRANGER)) as other,
        ):
            system.spawn(Echo, name="echo")
            address = await system.listen(ANY_PORT)
            theirs.allow(STRANGER.public, "worker")
            ref = await other.connect(address, actor="echo", server_key=WORKER.public)
            assert ref.node == system.node
            with pytest.raises(Refused, match="ended the handshake"):  # for the coordinator's key is expected without one
                await other.connect(address, actor="echo", timeout=20)

    run(scenario())


# --- who is not -------------------------------------------------------------------------------------------------------


async def with_an_unknown_key(address: str) -> None:
    with pytest.raises(Refused, match=r"refused our key .{40}: it is not allowed there$"):
        await connect(address, options=options_of(STRANGER))


async def without_a_key(address: str) -> None:
    with pytest.raises(Refused, match=r"takes only peers with keys \(CURVE\), and none were given here$"):
        await connect(address, options=CURVE_OPTIONS)


async def as_a_plain_socket(address: str) -> None:
    with ZmqStranger(address) as stranger:
        stranger.say_hello()
        with pytest.raises(TimeoutError):
            await stranger.hear(Kind.WELCOME, timeout_s=0.2)


async def as_a_client_that_says_worker(address: str) -> None:
    with pytest.raises(Refused, match="this key is not allowed to be a 'worker'"):
        await connect(address, hello=replace(CLIENT, role="worker"), options=options_of(CLIENT_PAIR))


async def as_a_worker_that_says_coordinator(address: str) -> None:
    with pytest.raises(Refused, match="this key is not allowed to be a 'coordinator'"):
        await connect(address, hello=replace(CLIENT, role="coordinator"), options=options_of(WORKER))


async def expecting_another_listener(address: str) -> None:
    with pytest.raises(Refused, match=rf"ended the handshake {MAX_CUT_HANDSHAKES} times, .* not the one that we expect$"):
        await connect(address, options=options_of(WORKER, server_key=STRANGER.public))


async def with_what_another_said(address: str) -> None:
    async with tapped(address) as recording:
        link = await connect(recording.address, hello=replace(CLIENT, role="client"), options=options_of(CLIENT_PAIR))
        await link.send([b"once is enough"], timeout_s=5)
        await link.close()
    await say_raw(address, bytes(recording.sent))


def saying(garbage: bytes) -> Callable[[str], Awaitable[None]]:
    async def say(address: str) -> None:
        await say_raw(address, garbage)

    return say


async def leaving_at_once(address: str) -> None:
    await say_raw(address, CURVE_GREETING, and_leave=True)


@pytest.mark.parametrize(
    ("attack", "logged"),
    [
        pytest.param(
            with_an_unknown_key, f"127.0.0.1 has the key {STRANGER.public}, which is not allowed here", id="unknown key"
        ),
        pytest.param(without_a_key, "it has no key", id="no key"),
        pytest.param(as_a_plain_socket, "it has no key", id="plain socket"),
        pytest.param(
            as_a_client_that_says_worker,
            f"this key is not allowed to be a 'worker' (key {CLIENT_PAIR.public})",
            id="client says worker",
        ),
        pytest.param(
            as_a_worker_that_says_coordinator,
            f"this key is not allowed to be a 'coordinator' (key {WORKER.public})",
            id="worker says coordinator",
        ),
        pytest.param(expecting_another_listener, "does not know this listener's key", id="other listener's key"),
        pytest.param(with_what_another_said, "or repeats another one", id="replay"),
        pytest.param(leaving_at_once, "fell silent before it had shown one", id="leaves"),
        *(pytest.param(saying(garbage), "", id=name) for name, garbage in GARBAGE.items()),
    ],
)
def test_who_is_not_allowed_is_refused_logged_once_and_harms_nobody(
    attack: Callable[[str], Awaitable[None]], logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        options = replace(coordinators_options(), handshake_s=1.0)  # some garbage may be the beginning of something
        async with guarded(options) as (address, links):
            for _ in range(ATTEMPTS):
                await attack(address)
            await until(lambda: not [link for link in links if link.is_open])
            assert len(links) == (ATTEMPTS if attack is with_what_another_said else 0)  # the recorded ones
            if logged:
                await until(lambda: warnings_in(caplog))

    num_threads = threading.active_count()
    run(scenario(), timeout_s=40)
    said = warnings_in(caplog)
    assert len(said) <= 1
    assert all(logged in line and line.startswith("refused a peer at tcp://127.0.0.1:") for line in said)
    assert not any(secret in line for line in said for secret in (COORDINATOR.secret, WORKER.secret, CLIENT_PAIR.secret))
    assert threading.active_count() == num_threads


def test_a_refusal_that_comes_before_hello_is_sent_is_said_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_late(hello: Hello) -> bytes:
        time.sleep(0.3)  # in which ZeroMQ shows our key, is refused and gives up
        return encode_hello(hello)

    async def scenario() -> None:
        async with guarded() as (address, _):
            monkeypatch.setattr("asyncpipe.transport.zmq.encode_hello", encode_late)
            await with_an_unknown_key(address)
            await without_a_key(address)

    run(scenario())


def test_nobody_goes_on_with_the_link_of_another_key(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with guarded() as (address, links):
            with ZmqStranger(address, routing_id=b"chosen", options=options_of(WORKER)) as worker:
                worker.say_hello()
                await worker.hear(Kind.WELCOME)
            links[0].start(receiver := Recorder())
            with ZmqStranger(address, routing_id=b"chosen", options=options_of(CLIENT_PAIR)) as client:
                client.say(HEADER.pack(Kind.CONTROL, 0), b"believe me")
                await until(lambda: warnings_in(caplog))
            assert receiver.deliveries == []

    run(scenario())
    (said,) = warnings_in(caplog)
    assert said.endswith(f"it spoke as worker node-c, whose key is another (key {CLIENT_PAIR.public})")


def test_a_key_is_not_shown_to_a_plain_listener(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with joined(ANY_PORT) as pair:
            with pytest.raises(Refused, match=r"uses no keys \(CURVE\), and we do"):
                await connect(pair.listener.address, options=options_of(WORKER))
            await pair.ours.send([b"still here"], timeout_s=5)
            await pair.their_receiver.has(1)

    run(scenario())
    assert warnings_in(caplog) == []


def test_a_wrong_listeners_key_is_said_also_when_time_runs_out() -> None:
    async def scenario() -> None:
        async with guarded() as (address, _):
            options = replace(options_of(WORKER, server_key=STRANGER.public), handshake_s=0.8)
            with pytest.raises(Timeout, match=r"nobody answered at .* within 0\.8 s: it ended the handshake"):
                await connect(address, options=options)

    run(scenario())


def test_who_says_nothing_is_cut_off_in_time(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with guarded(replace(coordinators_options(), handshake_s=0.3)) as (address, _):
            async with asyncio.timeout(5):
                await say_raw(address, b"")
                await say_raw(address, CURVE_GREETING)
            await until(lambda: warnings_in(caplog))

    run(scenario())
    assert ["fell silent" in line for line in warnings_in(caplog)] == [True]


def test_a_flood_of_strangers_while_the_loop_is_busy_does_not_stop_other_links() -> None:
    async def scenario() -> None:
        async with guarded() as (address, _):
            for _ in range(FLOOD):
                socket.create_connection((LOCALHOST, port_of(address)), timeout=10).close()

    run(scenario(), timeout_s=40)


# --- what can be heard on the way -------------------------------------------------------------------------------------


def test_what_is_said_with_keys_cannot_be_read_on_the_way() -> None:
    payload = hashlib.shake_256(b"payload").digest(2000)
    assert payload[:16] in run(bytes_on_the_way(payload, listeners=CURVE_OPTIONS, connectors=CURVE_OPTIONS))
    seen = run(bytes_on_the_way(payload, listeners=coordinators_options(), connectors=options_of(WORKER)))
    pieces = [payload[at : at + 16] for at in range(0, len(payload), 16)]
    assert len(seen) > 2 * len(payload)
    for plaintext in (*pieces, b"asyncpipe", b"worker", CLIENT.node.encode()):
        assert plaintext not in seen


async def bytes_on_the_way(payload: bytes, *, listeners: LinkOptions, connectors: LinkOptions) -> bytes:
    """Everything that travels while `payload` goes there and back."""
    listener, links = await listen(ANY_PORT, options=listeners)
    async with tapped(listener.address) as recording:
        link = await connect(recording.address, options=connectors)
        await until(lambda: links)
        link.start(ours := Recorder())
        links[0].start(theirs := Recorder())
        await link.send([payload], timeout_s=5)
        links[0].send_control([payload])
        await ours.has(1)
        await theirs.has(1)
        await link.close()
        await listener.close()
    return bytes(recording.sent + recording.answered)


# --- where keys are used ----------------------------------------------------------------------------------------------


def test_an_address_that_others_can_reach_may_be_bound_with_keys(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        listener, _ = await listen("tcp://0.0.0.0:0", options=replace(coordinators_options(), insecure=True))
        here = f"tcp://{LOCALHOST}:{port_of(listener.address)}"
        with pytest.raises(Refused, match="takes only peers with keys"):
            await connect(here, options=CURVE_OPTIONS)
        link = await connect(here, options=options_of(WORKER))
        await link.close()
        await listener.close()

    run(scenario())
    assert not [line for line in warnings_in(caplog) if "INSECURE" in line]


def test_insecure_lets_it_be_bound_without_keys_and_says_so_loudly(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        listener, _ = await listen("tcp://0.0.0.0:0", options=replace(CURVE_OPTIONS, insecure=True))
        await (await connect(f"tcp://{LOCALHOST}:{port_of(listener.address)}", options=CURVE_OPTIONS)).close()
        await listener.close()

    run(scenario())
    assert [line.startswith("INSECURE: whoever can reach tcp://0.0.0.0:0") for line in warnings_in(caplog)] == [True]


@pytest.mark.parametrize("scheme", ["ipc", "inproc", "memory"])
def test_other_schemes_use_no_keys(scheme: str) -> None:
    async def scenario() -> None:
        address = f"{scheme}://{'@' * (scheme == 'ipc')}{free_name()}"
        listener, links = await listen(address, options=coordinators_options())
        stranger = await connect(address, options=options_of(STRANGER))
        nobody = await connect(address, options=CURVE_OPTIONS)
        await until(lambda: len(links) == 2)
        assert [link.peer_key for link in (stranger, nobody, *links)] == [None] * 4
        await stranger.close()
        await nobody.close()
        await listener.close()

    run(scenario())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (replace(CURVE_OPTIONS, keys=Keys(WORKER)), "the public key of the listener at .* is not known"),
        (replace(CURVE_OPTIONS, server_key=WORKER.public), "is of no use without keys of our own"),
        (options_of(WORKER, server_key="short"), "is not a CURVE public key"),
    ],
)
def test_half_of_what_a_connector_needs_is_a_clear_mistake(options: LinkOptions, complaint: str) -> None:
    with pytest.raises(Invalid, match=complaint):
        run(connect("tcp://127.0.0.1:9", options=options))


def test_a_python_client_brings_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(tmp_path, [KeyName("coordinator", "coordinator"), KeyName("client", "alice")])

    async def scenario() -> None:
        keys = load_keys(tmp_path, role="coordinator", env={})
        async with ActorSystem("c", role="coordinator", options=replace(CURVE_OPTIONS, keys=keys)) as system:
            address = await system.listen(ANY_PORT)
            async with asyncpipe.connect(address, keys=tmp_path):
                assert len(system.statistics().links) == 1
            monkeypatch.setenv("ASYNCPIPE_KEYS", str(tmp_path))
            async with asyncpipe.connect(address):
                pass
            monkeypatch.delenv("ASYNCPIPE_KEYS")
            with pytest.raises(Refused, match="takes only peers with keys"):
                async with asyncpipe.connect(address):
                    pass

    run(scenario())


# --- nothing stays ----------------------------------------------------------------------------------------------------


def test_nothing_is_left_open_when_the_last_listener_has_closed() -> None:
    async def use() -> None:
        async with guarded() as (address, _), guarded() as (other_address, _):
            for attack in (with_an_unknown_key, without_a_key, as_a_client_that_says_worker):
                await attack(address)
                await attack(other_address)

    async def scenario() -> None:
        await use()
        num_files, num_threads = num_open_files(), threading.active_count()
        for _ in range(3):
            await use()
        await until(lambda: num_open_files() <= num_files)  # ZeroMQ closes in the background
        assert threading.active_count() == num_threads

    num_threads = threading.active_count()
    run(scenario(), timeout_s=40)
    assert threading.active_count() == num_threads
    assert not [thread for thread in threading.enumerate() if isinstance(thread, AuthenticationThread)]


def test_an_address_that_cannot_be_bound_leaves_nothing_open() -> None:
    async def scenario() -> None:
        async with guarded() as (address, _):
            num_files, num_threads = num_open_files(), threading.active_count()
            for _ in range(ATTEMPTS):
                with pytest.raises(Invalid, match="already in use"):
                    await listen(address, options=coordinators_options())
            await until(lambda: num_open_files() <= num_files)
            assert threading.active_count() == num_threads

    run(scenario())


def test_listeners_in_several_event_loops_do_not_depend_on_each_other() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    async def hold_a_listener() -> None:
        async with guarded():
            has_begun.set()
            await asyncio.to_thread(may_end.wait)

    async def use_a_listener() -> None:
        async with guarded() as (address, _):
            await with_an_unknown_key(address)

    num_threads = threading.active_count()
    holder = threading.Thread(target=lambda: run(hold_a_listener()))
    holder.start()
    assert has_begun.wait(10)
    run(use_a_listener())
    run(use_a_listener())
    may_end.set()
    holder.join()
    run(use_a_listener())
    assert threading.active_count() == num_threads


@pytest.mark.parametrize("end", ["", "kept.clear(); gc.collect()"])
def test_a_process_that_ends_with_its_links_open_ends_cleanly(end: str) -> None:
    script = """
import asyncio, gc
from tests.contract.curve_peers import coordinators_options, options_of, WORKER
from tests.contract.transport_peers import connect, listen
async def main():
    listener, links = await listen("tcp://127.0.0.1:0", options=coordinators_options())
    return [listener, *[await connect(listener.address, options=options_of(WORKER)) for _ in range(20)]]
kept = asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", script + end], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


# --- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_stays_short_however_many_keys_are_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    refusals = RefusalLog("tcp://here")
    for _ in range(2):
        for number in range(1000):
            refusals.refused(f"key {number}")
    assert len(warnings_in(caplog)) == MAX_REFUSALS
    assert warnings_in(caplog)[-1] == f"refused a peer at tcp://here: key {MAX_REFUSALS - 1} (more are not logged for a while)"
    now_s += FORGET_AFTER_S + 1
    refusals.refused("key 0")
    assert warnings_in(caplog)[MAX_REFUSALS:] == ["refused a peer at tcp://here: key 0"]


def test_a_peer_with_new_keys_all_the_time_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with guarded() as (address, _):
            for _ in range(MAX_REFUSALS + 10):
                with pytest.raises(Refused):
                    await connect(address, options=options_of(KeyPair.new()))

    run(scenario())
    assert len(warnings_in(caplog)) == MAX_REFUSALS
