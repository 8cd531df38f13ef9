"""What every transport does alike."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from asyncpipe.errors import Broken, Busy, Closed, Invalid, Refused, Timeout
from asyncpipe.transport.base import Lane, Link, LinkOptions
from asyncpipe.transport.keys import KeyPair, Keys
from asyncpipe.transport.registry import transport_for
from asyncpipe.wire.tensors import Buffer
from tests.contract.transport_peers import (
    CLIENT,
    OPTIONS,
    SERVER,
    Recorder,
    connect,
    free_name,
    joined,
    listen,
    listen_when_free,
)
from tests.support import run, until


@dataclass(frozen=True)
class Case:
    new_address: Callable[[], str]
    options: LinkOptions = OPTIONS


TOKEN = "only-for-tests"
PAIR = KeyPair.new()
KEYS = Keys(PAIR, coordinator=PAIR.public, allowed={PAIR.public: frozenset({CLIENT.role})})  # the same on both ends

CASES = {
    "memory": Case(lambda: f"memory://{free_name()}"),
    "inproc": Case(lambda: f"inproc://{free_name()}"),
    "ipc": Case(lambda: f"ipc://@{free_name()}"),
    "ipc-inline": Case(lambda: f"ipc://@{free_name()}", replace(OPTIONS, shared_memory=False)),
    "tcp": Case(lambda: "tcp://127.0.0.1:0"),
    "tcp-inline": Case(lambda: "tcp://127.0.0.1:0", replace(OPTIONS, shared_memory=False)),
    "tcp-curve": Case(lambda: "tcp://127.0.0.1:0", replace(OPTIONS, shared_memory=False, keys=KEYS)),
    "tcp-curve-shm": Case(lambda: "tcp://127.0.0.1:0", replace(OPTIONS, keys=KEYS)),
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


# --- delivery ---------------------------------------------------------------------------------------------------------


def test_messages_arrive_in_order_both_ways(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options) as pair:
            for index in range(300):
                await pair.ours.send([b"out", str(index).encode()], timeout_s=5)
                await pair.theirs.send([b"back", str(index).encode()], timeout_s=5)
            assert await pair.their_receiver.has(300) == [[b"out", str(i).encode()] for i in range(300)]
            assert await pair.our_receiver.has(300) == [[b"back", str(i).encode()] for i in range(300)]

    run(scenario())


def test_a_delivery_names_its_lane_and_frames_may_be_empty(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options) as pair:
            await pair.ours.send([b"", b"data", b""], timeout_s=5)
            pair.ours.send_control([bytearray(b"control"), memoryview(b"view")])
            assert await pair.their_receiver.has(2) == [[b"", b"data", b""], [b"control", b"view"]]
            assert [d.lane for d in pair.their_receiver.deliveries] == [Lane.DATA, Lane.CONTROL]

    run(scenario())


def test_nothing_is_delivered_within_the_senders_call(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options) as pair:
            pair.ours.send_control([b"x"])
            assert pair.their_receiver.deliveries == []
            await pair.their_receiver.has(1)

    run(scenario())


def test_messages_before_start_are_kept_and_come_first(case: Case) -> None:
    async def scenario() -> None:
        listener, accepted = await listen(case.new_address(), options=case.options)
        ours = await connect(listener.address, options=case.options)
        await ours.send([b"early"], timeout_s=5)
        ours.send_control([b"early control"])
        await until(lambda: accepted and accepted[0].statistics().received_messages == 2)
        accepted[0].start(receiver := Recorder())
        await ours.send([b"late"], timeout_s=5)
        assert await receiver.has(3) == [[b"early"], [b"early control"], [b"late"]]
        await ours.close()
        await listener.close()

    run(scenario())


def test_large_frames_arrive_whole_between_small_ones(case: Case) -> None:
    large = hashlib.shake_256(b"large").digest(8 * 1024 * 1024)

    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options) as pair:
            for index in range(4):  # the first may go inline while shared memory is being set up
                await pair.ours.send([b"head", memoryview(large), b"tail", bytes([index])], timeout_s=5)
                await pair.their_receiver.has(index + 1)
                frames = pair.their_receiver.deliveries[index].frames
                assert [bytes(frames[0]), bytes(frames[2]), bytes(frames[3])] == [b"head", b"tail", bytes([index])]
                assert frames[1] == large
            pair.theirs.send_control([b"reply", large])
            await pair.our_receiver.has(1)
            assert pair.our_receiver.deliveries[0].frames[1] == large

    run(scenario())


# --- backpressure -----------------------------------------------------------------------------------------------------


def test_exactly_a_window_of_messages_goes_out_until_one_is_done(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options, holds=True) as pair:
            for index in range(4):
                await pair.ours.send([bytes([index])], timeout_s=1)
            with pytest.raises(Timeout, match=r"coordinator node-s took no message for 0\.05 s \(4 are waiting there\)"):
                await pair.ours.send([b"too many"], timeout_s=0.05)
            with pytest.raises(Busy, match="4 messages that it has not taken yet"):
                pair.ours.try_send([b"too many"])
            await pair.their_receiver.has(4)
            pair.their_receiver.deliveries[0].done()
            await pair.ours.send([b"fifth"], timeout_s=1)
            assert (await pair.their_receiver.has(5))[-1] == [b"fifth"]

    run(scenario())


def test_the_smaller_window_of_the_two_ends_counts(case: Case) -> None:
    async def scenario() -> None:
        listener, accepted = await listen(case.new_address(), options=replace(case.options, window=64))
        ours = await connect(listener.address, options=replace(case.options, window=3))
        await until(lambda: accepted)
        accepted[0].start(receiver := Recorder(holds=True))
        for index in range(20):
            await ours.send([bytes([index])], timeout_s=1)
            await receiver.has(index + 1)
            if index >= 2:
                receiver.deliveries[index - 2].done()
        assert ours.statistics().credits <= 3
        await ours.close()
        await listener.close()

    run(scenario())


@pytest.mark.parametrize("num_held", [0, 1, 2, 3])
def test_a_sender_never_starves_while_others_are_held(case: Case, num_held: int) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options, holds=True) as pair:
            for index in range(num_held):
                await pair.ours.send([bytes([index])], timeout_s=1)
            await pair.their_receiver.has(num_held)
            pair.their_receiver.holds = False
            for _ in range(20):
                await pair.ours.send([b"more"], timeout_s=1)
            await pair.their_receiver.has(num_held + 20)

    run(scenario())


def test_control_passes_blocked_data(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options, holds=True) as pair:
            for _ in range(4):
                await pair.ours.send([b"data"], timeout_s=1)
            blocked = asyncio.create_task(pair.ours.send([b"blocked"], timeout_s=5))
            await asyncio.sleep(0)
            pair.ours.send_control([b"urgent"])
            assert (await pair.their_receiver.has(5))[4] == [b"urgent"]
            assert not blocked.done()
            for delivery in list(pair.their_receiver.deliveries):
                delivery.done()
            await blocked

    run(scenario())


def test_control_without_end_is_busy_and_memory_stays_bounded(case: Case) -> None:
    async def scenario() -> None:
        options = replace(case.options, control_window=50)
        async with joined(case.new_address(), options=options) as pair:
            with pytest.raises(Busy):
                send_control_for_ever(pair.ours)
            sent = pair.ours.statistics().sent_messages
            assert sent < 20_000
            await pair.their_receiver.has(sent)
            pair.ours.send_control([b"room again"])
            await pair.their_receiver.has(sent + 1)

    run(scenario())


def send_control_for_ever(link: Link) -> None:
    for _ in range(200_000):  # the loop never turns, so that nobody receives
        link.send_control([b"x" * 1000])


def test_waiting_senders_are_served_in_order_and_a_cancelled_one_loses_no_credit(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options, holds=True) as pair:
            for _ in range(4):
                await pair.ours.send([b"first"], timeout_s=1)
            waiting = [asyncio.create_task(pair.ours.send([bytes([i])], timeout_s=5)) for i in range(4)]
            await until(lambda: pair.ours.statistics().senders_waiting == 4)
            waiting[1].cancel()
            await pair.their_receiver.has(4)
            for delivery in list(pair.their_receiver.deliveries):
                delivery.done()
                delivery.done()  # once is enough
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(results[1], asyncio.CancelledError)
            assert (await pair.their_receiver.has(7))[4:] == [[b"\x00"], [b"\x02"], [b"\x03"]]
            await pair.ours.send([b"the credit that was not used"], timeout_s=1)

    run(scenario())


# --- the end ----------------------------------------------------------------------------------------------------------


def test_close_is_closed_here_and_broken_there(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options) as pair:
            await pair.ours.send([b"last words"], timeout_s=1)
            await pair.ours.close()
            await pair.ours.close()
            assert isinstance(await pair.our_receiver.lost, Closed)
            error = await asyncio.wait_for(pair.their_receiver.lost, 5)
            assert isinstance(error, Broken) and "worker node-c closed the link" in str(error)
            assert pair.their_receiver.bodies() == [[b"last words"]]
            assert not pair.ours.is_open and not pair.theirs.is_open
            with pytest.raises(Closed):
                pair.ours.send_control([b"x"])
            with pytest.raises(Closed):
                await pair.ours.send([b"x"], timeout_s=1)
            with pytest.raises(Broken):
                await pair.theirs.send([b"x"], timeout_s=1)

    run(scenario())


def test_closing_the_listener_closes_its_links_and_frees_the_address(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options) as pair:
            await pair.listener.close()
            await pair.listener.close()
            assert isinstance(await asyncio.wait_for(pair.our_receiver.lost, 5), Broken)
            assert isinstance(await pair.their_receiver.lost, Closed)

    run(scenario())


def test_waiting_senders_hear_how_the_link_ended(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options, holds=True) as pair:
            for _ in range(4):
                await pair.ours.send([b"x"], timeout_s=1)
            waiting = asyncio.create_task(pair.ours.send([b"x"], timeout_s=5))
            await until(lambda: pair.ours.statistics().senders_waiting == 1)
            await pair.ours.close()
            with pytest.raises(Closed):
                await waiting

    run(scenario())


def test_abort_ends_a_link_with_the_given_error_and_the_peer_notices(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options) as pair:
            pair.theirs.abort(Broken("its process was reaped"))
            assert str(await pair.their_receiver.lost) == "its process was reaped"
            assert isinstance(await asyncio.wait_for(pair.our_receiver.lost, 5), Broken)

    run(scenario())


# --- the handshake ----------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_and_the_right_one_is_not(case: Case) -> None:
    async def scenario() -> None:
        listener, accepted = await listen(case.new_address(), hello=replace(SERVER, token=TOKEN), options=case.options)
        for token in ("", "guess"):
            with pytest.raises(Refused, match="wrong or missing token"):
                await connect(listener.address, hello=replace(CLIENT, token=token), options=case.options)
        assert accepted == []
        link = await connect(listener.address, hello=replace(CLIENT, token=TOKEN), options=case.options)
        assert link.remote.node == "node-s"
        await link.close()
        await listener.close()

    run(scenario())


def test_another_major_version_is_refused(case: Case) -> None:
    async def scenario() -> None:
        listener, accepted = await listen(case.new_address(), options=case.options)
        with pytest.raises(Refused, match=r"protocol 2\.0 is not spoken here; this side speaks 1\.x"):
            await connect(listener.address, hello=replace(CLIENT, major=2), options=case.options)
        assert accepted == []
        await listener.close()

    run(scenario())


def test_a_silent_address_is_a_timeout_that_names_it(case: Case) -> None:
    async def scenario() -> None:
        address = case.new_address().replace(":0", ":9")
        with pytest.raises(Timeout, match=r"nobody answered at .* within 0\.1 s"):
            await connect(address, options=replace(case.options, handshake_s=0.1))

    run(scenario())


def test_an_address_in_use_is_a_clear_mistake(case: Case) -> None:
    async def scenario() -> None:
        listener, _ = await listen(case.new_address(), options=case.options)
        with pytest.raises(Invalid, match=r"is already in use; choose another (name|port or 0)$"):
            await listen(listener.address, options=case.options)
        await listener.close()

    run(scenario())


def test_the_connector_may_come_first(case: Case) -> None:
    async def scenario() -> None:
        address = case.new_address()
        if address.startswith("tcp://"):  # whose address is known only once a port has been given
            probe, _ = await listen(address, options=case.options)
            address = probe.address
            await probe.close()
        connecting = asyncio.create_task(connect(address, options=case.options))
        await asyncio.sleep(0.05)
        listener, _ = await listen_when_free(address, case.options)
        link = await connecting
        await link.close()
        await listener.close()

    run(scenario())


# --- limits and numbers -----------------------------------------------------------------------------------------------


def test_what_the_peer_cannot_take_is_a_local_mistake(case: Case) -> None:
    async def scenario() -> None:
        options = replace(case.options, max_frame_bytes=1000, max_frames=3)
        async with joined(case.new_address(), options=options) as pair:
            too_much: list[list[Buffer]] = [[], [b"x"] * 4, [b"x" * 1001], [b"ok", memoryview(b"y" * 2000)]]
            for frames in too_much:
                with pytest.raises(Invalid):
                    await pair.ours.send(frames, timeout_s=1)
                with pytest.raises(Invalid):
                    pair.ours.send_control(frames)
            await pair.ours.send([b"x" * 1000] * 3, timeout_s=1)
            assert await pair.their_receiver.has(1) == [[b"x" * 1000] * 3]
            assert pair.ours.statistics().credits >= 3  # mistakes cost none

    run(scenario())


def test_statistics_count_what_was_sent_and_received(case: Case) -> None:
    async def scenario() -> None:
        async with joined(case.new_address(), options=case.options, holds=True) as pair:
            await pair.ours.send([b"12345", b"678"], timeout_s=1)
            pair.ours.send_control([b"90"])
            await pair.their_receiver.has(2)
            sent, received = pair.ours.statistics(), pair.theirs.statistics()
            assert (sent.sent_messages, sent.sent_bytes, sent.credits, sent.senders_waiting) == (2, 10, 3, 0)
            assert (received.received_messages, received.received_bytes, received.credits) == (2, 10, 4)

    run(scenario())


@pytest.mark.parametrize("address", ["", "memory://", "http://127.0.0.1:80", "127.0.0.1:5550", "tcp:/x"])
def test_an_address_without_a_known_scheme_is_a_mistake_that_names_the_schemes(address: str) -> None:
    with pytest.raises(Invalid, match=r"is not an address; write one of memory://, ipc://, inproc://, tcp://") as caught:
        transport_for(address)
    assert "\n" not in str(caught.value)
