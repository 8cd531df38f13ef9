"""What holds for every tensor link: between two process groups of one process, between processes, and over ZeroMQ."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from asyncpipe.errors import Broken, Busy, Closed, Invalid, Timeout
from asyncpipe_workers.links import LinkKind, LinkOffer, TensorLink, host, join
from asyncpipe_workers.links.base import MAX_TAG
from asyncpipe_workers.staging import Buffers, StagingRing
from tests.contract.link_peers import (
    EPOCH,
    IP,
    LARGE,
    MAX_IN_FLIGHT,
    NAMES,
    Table,
    child,
    meet,
    numbers,
    pair,
    perform,
    perform_with_child,
    port_pair,
)
from tests.support import run

LATE_S = 0.3  # of the plays that wait for a deadline


KINDS = ["gloo", "zmq"]


@contextlib.asynccontextmanager
async def links_of(kind: str, *, timeout_s: float = 5.0) -> AsyncIterator[tuple[TensorLink, TensorLink]]:
    """The sender's end and the receiver's, both in this process."""
    async with port_pair(timeout_s) if kind == "zmq" else pair(Table(timeout_s=timeout_s)) as links:
        yield links


async def performed(play: str, kind: str, *, timeout_s: float = 5.0) -> None:
    async with links_of(kind, timeout_s=timeout_s) as links:
        await perform(play, links)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """No thread and no socket, of whatever a test does."""
    before = threads_and_sockets()
    yield
    deadline_s = time.monotonic() + 5.0
    while (left := threads_and_sockets() - before) and time.monotonic() < deadline_s:
        time.sleep(0.005)  # what Gloo was in the middle of stays until its deadline
    assert not left


def threads_and_sockets() -> Counter[str]:
    """Ours, Gloo's and the store's threads by name, and how many sockets are open."""
    found = Counter(thread.name for thread in threading.enumerate() if thread.name.startswith("link"))
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            found[name] += name.startswith(("gloo_", "pt_"))
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found["sockets"] += os.readlink(file).startswith("socket:")
    return +found


# --- transfers ---


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_arrive_as_they_were_sent(kind: str) -> None:
    run(performed("many kinds", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_transfers_are_posted_ahead_and_overlap(kind: str) -> None:
    run(performed("at once", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_send_may_come_before_its_receive(kind: str) -> None:
    run(performed("sent ahead", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_tags_match_in_any_order(kind: str) -> None:
    run(performed("any order", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_receive_takes_its_tensor_and_the_link_goes_on(kind: str) -> None:
    run(performed("cancelled", kind))


def test_a_tensor_without_elements_is_a_transfer_like_any_other() -> None:
    async def scenario() -> None:
        async with links_of("gloo") as (sender, receiver):
            sent = sender.send(1, torch.empty(0, 8))
            assert (await receiver.recv(1, shape=(0, 8), dtype=torch.float32)).shape == (0, 8)
            await sent

    run(scenario())


# --- failures ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_does_not_come_says_which_from_whom_how_long_and_ends_the_link(kind: str) -> None:
    run(performed("not sent", kind, timeout_s=LATE_S))


def test_what_was_sent_arrives_though_the_sender_leaves_and_nothing_else_does() -> None:
    """Not so of a port that stops: that notice overtakes its data."""
    run(performed("sender leaves", "gloo"))


@pytest.mark.parametrize("kind", KINDS)
def test_closing_fails_what_is_under_way_and_all_that_comes_later(kind: str) -> None:
    run(performed("receiver closes", kind))


def test_a_tensor_that_nobody_takes_is_late_too() -> None:
    async def scenario() -> None:
        async with links_of("gloo", timeout_s=LATE_S) as (sender, _):
            with pytest.raises(Timeout, match=r"tensor 5 was not taken by stage 1 within 0\.3 s"):
                await sender.send(5, numbers(10))

    run(scenario())


def test_an_idle_link_hears_that_its_peer_has_left() -> None:
    async def scenario() -> None:
        async with links_of("gloo") as (sender, receiver):
            await receiver.close()
            async with asyncio.timeout(2):
                while sender._in_flight.failure is None:  # type: ignore[attr-defined]
                    await asyncio.sleep(0.001)
            with pytest.raises(Broken, match="the link to stage 1 broke: Connection closed by peer"):
                sender.send(0, numbers(1))

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_a_bound_to_what_is_under_way(kind: str) -> None:
    async def scenario() -> None:
        async with links_of(kind) as (_, receiver):
            receives = [receiver.recv(tag, shape=(1,), dtype=torch.float32) for tag in range(MAX_IN_FLIGHT)]
            with pytest.raises(Busy, match="4 transfers are under way"):
                receiver.recv(MAX_IN_FLIGHT, shape=(1,), dtype=torch.float32)
            assert receiver.statistics().in_flight == MAX_IN_FLIGHT
            await receiver.close()
            assert all(isinstance(receive.exception(), Closed) for receive in receives)

    run(scenario())


def test_a_callers_mistakes_are_said_at_once_and_end_nothing() -> None:
    async def scenario() -> None:
        async with links_of("gloo") as (sender, receiver):
            first = receiver.recv(0, shape=(1,), dtype=torch.float32)
            with pytest.raises(Invalid, match="tag 0 is under way already"):
                receiver.recv(0, shape=(1,), dtype=torch.float32)
            with pytest.raises(Invalid, match=f"tag -1 is not between 0 and {MAX_TAG}"):
                sender.send(-1, numbers(1))
            with pytest.raises(Invalid, match="sender's end of a one-way link"):
                sender.recv(1, shape=(1,), dtype=torch.float32)
            with pytest.raises(Invalid, match="sends tensors of cpu; this one is on meta"):
                sender.send(1, torch.empty(1, device="meta"))
            await sender.send(0, numbers(1))
            assert torch.equal(await first, numbers(1))

    run(scenario())


# --- between processes ---


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGKILL, Broken), (signal.SIGSTOP, Timeout)])
@pytest.mark.parametrize("lost", ["sender", "receiver"])
def test_a_process_lost_in_the_middle_of_a_transfer_is_an_error_in_time(
    lost: str, number: signal.Signals, expected: type[Exception]
) -> None:
    """Killed, it breaks the connection; stopped, it is late."""
    ours = "receiver" if lost == "sender" else "sender"

    async def scenario() -> None:
        async with child("without end", lost, Table(timeout_s=10.0)) as (process, words):
            link = await meet(ours, words, Table(timeout_s=2.0))
            for tag in range(2):
                await transfer(link, tag)
            under_way = transfer(link, 2)
            await asyncio.sleep(0.005)  # of about fifty
            os.kill(process.pid, number)
            start_s = time.monotonic()
            with pytest.raises(expected, match=NAMES[lost]):
                await under_way
                await transfer(link, 3)  # the signal came late
            assert time.monotonic() - start_s < (1.0 if expected is Broken else 3.0)
            await link.close()

    def transfer(link: TensorLink, tag: int) -> asyncio.Future[Any]:
        if ours == "sender":
            return link.send(tag, LARGE)
        return link.recv(tag, shape=tuple(LARGE.shape), dtype=LARGE.dtype)

    run(scenario(), timeout_s=40)


def test_the_ends_may_be_in_different_processes() -> None:
    run(perform_with_child("many kinds", "receiver", Table()), timeout_s=40)


# --- how ends meet ---


def listening() -> set[tuple[str, int]]:
    """Where this process listens over TCP."""
    ours = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            ours.add(os.readlink(file))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours:
                ip, _, port = fields[1].partition(":")
                words = [bytes.fromhex(ip[at : at + 8])[::-1] for at in range(0, len(ip), 8)]
                found.add((str(ipaddress.ip_address(b"".join(words))), int(port, 16)))
    return found


def test_everything_listens_on_the_named_interface_only() -> None:
    async def scenario() -> None:
        hosting = await host(LinkKind.GLOO, address_ip="127.0.0.3", epoch=EPOCH)
        assert ("127.0.0.3", hosting.offer.port) in listening()
        links = await asyncio.gather(join(hosting.offer), hosting.joined())
        assert {ip for ip, _ in listening()} <= {"127.0.0.3", IP}, "the sender's is where it reaches the host from"
        await asyncio.gather(*(link.close() for link in links))

    run(scenario())


def test_a_sender_that_does_not_join_is_late() -> None:
    async def scenario() -> None:
        hosting = await host(LinkKind.GLOO, address_ip=IP, epoch=EPOCH, peer="stage 0", timeout_s=0.2)
        with pytest.raises(Timeout, match=r"stage 0 did not join within 0\.2 s"):
            await hosting.joined()

    run(scenario())


def test_waiting_for_a_sender_can_be_cancelled_and_closed() -> None:
    async def scenario() -> None:
        cancelled = await host(LinkKind.GLOO, address_ip=IP, epoch=EPOCH)
        closed = await host(LinkKind.GLOO, address_ip=IP, epoch=EPOCH, peer="stage 0")
        never_awaited = await host(LinkKind.GLOO, address_ip=IP, epoch=EPOCH)
        first, second = asyncio.ensure_future(cancelled.joined()), asyncio.ensure_future(closed.joined())
        await asyncio.sleep(0.02)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await closed.close()
        with pytest.raises(Closed, match="stage 0 is not awaited any more"):
            await second
        await never_awaited.close()
        await never_awaited.close()

    run(scenario())


def test_where_nobody_listens_a_join_fails_at_once() -> None:
    async def scenario() -> None:
        hosting = await host(LinkKind.GLOO, address_ip=IP, epoch=EPOCH)
        await hosting.close()
        with pytest.raises(Broken, match="stage 1 could not be met: Connection refused"):
            await join(hosting.offer, peer="stage 1")

    run(scenario())


def test_a_stranger_without_the_token_gets_no_link() -> None:
    async def scenario() -> None:
        hosting = await host(LinkKind.GLOO, address_ip=IP, epoch=EPOCH, timeout_s=0.5)
        stale = msgspec.structs.replace(hosting.offer, token="0" * 32)
        joins = await asyncio.gather(join(stale, timeout_s=0.2), hosting.joined(), return_exceptions=True)
        assert [type(error) for error in joins] == [Timeout, Timeout]

    run(scenario())


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (LinkKind.ZMQ, {}, "zmq needs no link"),
        (LinkKind.GLOO, {"address_ip": "::"}, ":: is all of them"),
        (LinkKind.GLOO, {"address_ip": "localhost"}, "not on 'localhost'"),
        (LinkKind.GLOO, {"address_ip": "192.0.2.1"}, "cannot listen on 192.0.2.1: Cannot assign"),
        (LinkKind.GLOO, {"timeout_s": 0.0}, "needs time and room"),
        (LinkKind.GLOO, {"device": torch.device("cuda:0")}, "Gloo links carry tensors of CPUs, not of cuda:0"),
        (LinkKind.NCCL, {}, "NCCL links carry tensors of GPUs, not of cpu"),
    ],
)
def test_what_cannot_be_hosted_is_said_in_one_line(kind: LinkKind, arguments: dict[str, Any], message: str) -> None:
    async def scenario() -> None:
        with pytest.raises(Invalid, match=re.escape(message)):
            await host(kind, **{"address_ip": IP, "epoch": EPOCH, **arguments})

    run(scenario())


def test_offers_travel_as_messages() -> None:
    offer = LinkOffer(kind=LinkKind.NCCL, host_ip="10.0.0.7", port=4711, epoch=3, token="0123456789abcdef")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(offer), type=LinkOffer) == offer
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({**msgspec.to_builtins(offer), "port": 0}), type=LinkOffer)


# --- staging ---


class Copy:
    """Stands for a CUDA event."""

    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


def test_on_a_cpu_staging_copies_nothing() -> None:
    ring = StagingRing(torch.device("cpu"), num_buffers=2, buffer_bytes=1024)
    tensor = numbers(3, 5, dtype=torch.bfloat16)
    copy = ring.to_host(tensor)
    copy.wait()
    back = ring.to_device(copy.tensor)
    assert torch.equal(back, tensor)
    assert back.data_ptr() == tensor.data_ptr()
    assert ring.to_device(ring.to_host(torch.empty(0, 4)).tensor).shape == (0, 4)


def test_a_staging_buffer_comes_back_when_its_message_is_gone_and_its_copy_done() -> None:
    buffers = Buffers(num_buffers=2, buffer_bytes=64, pinned=False)
    assert buffers.take(65) is None, "it is larger than a buffer"
    buffer = buffers.take(64)
    assert buffer is not None
    buffer.bytes.fill_(7)
    buffer.last_copy = copy = Copy()
    part = buffers.lend(buffer, 16)[4:8].cast("b")
    other = buffers.take(1)
    assert other is not None
    assert (bytes(part), len(buffers), buffers.take(1)) == (b"\x07" * 4, 0, None)
    del part
    assert (len(buffers), buffers.take(1)) == (1, None), "the device may still write to it"
    copy.synchronize()
    assert buffers.take(1) is buffer
    buffers.give_back(other)
    assert len(buffers) == 1
