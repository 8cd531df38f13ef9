"""Shared memory between two peers: what it carries, when it is given back, and what cannot go wrong with it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import sys
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from asyncpipe.errors import Broken, WireError
from asyncpipe.transport import shm
from asyncpipe.transport.credit import Kind
from asyncpipe.transport.shm import ENTRY, PAGE_BYTES, Arena, FreeList, PeerMemory, proof, verified_pid
from tests.contract.transport_peers import CLIENT, HEADER, OPTIONS, Recorder, free_name, joined, listen, stranger_at
from tests.support import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create is Linux's")

MEGABYTE = 1 << 20


# --- links ------------------------------------------------------------------------------------------------------------


def filled(size: int, value: int) -> memoryview:
    return np.full(size, value, dtype=np.uint8).data


def test_large_frames_go_through_shared_memory_read_only_and_come_back() -> None:
    async def scenario() -> None:
        async with joined(f"ipc://@{free_name()}") as pair:
            for index in range(50):  # 50 x 24 MB is more than the arena: it only works when regions come back
                await pair.ours.send([b"head", filled(24 * MEGABYTE, index), b"tail"], timeout_s=5)
                await pair.their_receiver.has(1)
                frames = pair.their_receiver.deliveries.pop().frames
                view = frames[1]
                assert isinstance(view, memoryview)
                assert (view[0], view[-1], view.nbytes, view.readonly) == (index, index, 24 * MEGABYTE, True)
                del frames, view
            num_shared = pair.ours.statistics().shared_memory_bytes // (24 * MEGABYTE)
            assert num_shared >= 40  # inline are the first, and those that were sent before a release had come back

    run(scenario())


def test_derived_views_keep_their_region_and_a_full_arena_means_inline() -> None:
    async def scenario() -> None:
        options = replace(OPTIONS, window=32)
        async with joined(f"ipc://@{free_name()}", options=options) as pair:
            kept: list[npt.NDArray[np.uint8]] = []
            for index in range(12):
                await pair.ours.send([filled(60 * MEGABYTE, index)], timeout_s=5)
                await pair.their_receiver.has(1)
                data = pair.their_receiver.deliveries.pop().frames[0]
                kept.append(np.frombuffer(data, dtype=np.int32)[1000:].view(np.uint8)[::2])
                del data
            assert pair.ours.statistics().shared_memory_bytes < shm.MAX_ARENA_BYTES
            assert [int(array[0]) for array in kept] == list(range(12))  # nothing was overwritten
            kept.clear()
            gc.collect()
            before = pair.ours.statistics().shared_memory_bytes
            await asyncio.sleep(0.1)
            await pair.ours.send([filled(60 * MEGABYTE, 0)], timeout_s=5)
            assert pair.ours.statistics().shared_memory_bytes > before

    run(scenario(), timeout_s=30)


def test_views_outlive_their_link_and_its_sender() -> None:
    async def scenario() -> npt.NDArray[np.uint8]:
        async with joined(f"ipc://@{free_name()}") as pair:
            while pair.ours.statistics().shared_memory_bytes == 0:
                await pair.ours.send([filled(MEGABYTE, 7)], timeout_s=5)
                await asyncio.sleep(0.001)
            count = pair.ours.statistics().sent_messages
            await pair.their_receiver.has(count)
            return np.frombuffer(pair.their_receiver.deliveries[count - 1].frames[0], np.uint8)

    array = run(scenario())
    gc.collect()
    assert (array == 7).all()
    del array  # after its loop has been closed


def test_a_region_dropped_in_another_thread_comes_back() -> None:
    async def scenario() -> None:
        async with joined(f"ipc://@{free_name()}") as pair:
            for _ in range(30):
                await pair.ours.send([filled(40 * MEGABYTE, 0)], timeout_s=5)
                await pair.their_receiver.has(1)
                await asyncio.to_thread(pair.their_receiver.deliveries.clear)
            assert pair.ours.statistics().shared_memory_bytes > shm.MAX_ARENA_BYTES

    run(scenario())


def test_without_shared_memory_on_either_side_frames_go_inline() -> None:
    async def scenario() -> None:
        async with joined(f"ipc://@{free_name()}", options=replace(OPTIONS, shared_memory=False)) as pair:
            for _ in range(3):
                await pair.ours.send([bytes(MEGABYTE)], timeout_s=5)
            await pair.their_receiver.has(3)
            assert pair.ours.statistics().shared_memory_bytes == 0

    run(scenario())


@pytest.mark.parametrize(
    "lie",
    ["", "x", "1:2:3", f"SELF:0:{'0' * 32}", f"{2**22 + 1}:3:{'0' * 32}", f"1:1:{'a' * 32}", "٣:3:" + "0" * 32],
)
def test_a_false_proof_is_not_believed(lie: str) -> None:
    assert verified_pid(lie.replace("SELF", str(os.getpid()))) is None


def test_a_true_proof_is_believed_but_not_with_another_nonce() -> None:
    text = proof()
    assert verified_pid(text) == os.getpid()
    assert verified_pid(text[:-1] + ("0" if text[-1] != "0" else "1")) is None


def test_memory_that_could_shrink_is_not_mapped() -> None:
    async def scenario() -> None:
        fd = os.memfd_create(shm.MEMFD_NAME, os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE_BYTES)
        assert not PeerMemory(os.getpid(), lambda region: None, max_frames=4).map(fd)
        os.close(fd)

    run(scenario())


# --- liars ------------------------------------------------------------------------------------------------------------


def shared_memory_of(size: int) -> int:
    return shm._create_memfd(size)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (b"", "needs a table"),
        (b"x" * (ENTRY.size - 1), "needs a table"),
        (ENTRY.pack(0, 1, 0, 0, 1) * 67, "needs a table"),
        (ENTRY.pack(1, 1, 0, 0, 1), "frame 1 of a message is missing"),
        (ENTRY.pack(0, 1, 1, 0, 1), "segment 1 of shared memory was never announced"),
        (ENTRY.pack(0, 1, 0, 0, 0), "0 bytes at 0"),
        (ENTRY.pack(0, 1, 0, 0, PAGE_BYTES + 1), "4097 bytes at 0 are not in a segment of 4096 bytes"),
        (ENTRY.pack(0, 1, 0, PAGE_BYTES, 1), "1 bytes at 4096"),
        (ENTRY.pack(0, 1, 0, 2**64 - 1, 2), "2 bytes at 18446744073709551615"),
        (ENTRY.pack(0, 1, 0, 1, 2**64 - 1), "bytes at 1 are not in a segment"),
    ],
)
def test_a_table_that_lies_ends_its_link(table: bytes, complaint: str) -> None:
    async def scenario() -> None:
        fd = shared_memory_of(PAGE_BYTES)
        listener, accepted = await listen(f"ipc://@{free_name()}")
        with stranger_at(listener.address) as stranger:
            stranger.say_hello(replace(CLIENT, shm=proof()))
            await stranger.hear(Kind.SHARED)
            accepted[0].start(receiver := Recorder())
            stranger.say(HEADER.pack(Kind.SEGMENT, fd))
            await stranger.hear(Kind.MAPPED)
            stranger.say(HEADER.pack(Kind.SHARED_DATA, 0), ENTRY.pack(0, 1, 0, 0, PAGE_BYTES))
            stranger.say(HEADER.pack(Kind.SHARED_DATA, 0), table)
            error = await asyncio.wait_for(receiver.lost, 5)
            assert isinstance(error, WireError) and complaint in str(error)
            assert receiver.bodies() == [[bytes(PAGE_BYTES)]]
        os.close(fd)
        await listener.close()

    run(scenario())


@pytest.mark.parametrize("kind", [Kind.RELEASE, Kind.MAPPED, Kind.SHARED])
def test_answers_to_what_was_not_asked_end_the_link(kind: Kind) -> None:
    async def scenario() -> None:
        listener, accepted = await listen(f"ipc://@{free_name()}")
        with stranger_at(listener.address) as stranger:
            stranger.say_hello()
            await stranger.hear(Kind.WELCOME)
            accepted[0].start(receiver := Recorder())
            stranger.say(HEADER.pack(Kind.SHARED, 1))
            stranger.say(HEADER.pack(kind, 1))
            assert isinstance(await asyncio.wait_for(receiver.lost, 5), WireError)
        await listener.close()

    run(scenario())


def test_too_much_memory_is_not_mapped() -> None:
    async def scenario() -> None:
        memory = PeerMemory(os.getpid(), lambda region: None, max_frames=4)
        fds = [shared_memory_of(shm.MAX_ARENA_BYTES // 2) for _ in range(3)]  # never touched, so it costs nothing
        assert [memory.map(fd) for fd in fds] == [True, True, False]
        for fd in fds:
            os.close(fd)

    run(scenario())


# --- the arena --------------------------------------------------------------------------------------------------------


def test_the_free_list_hands_out_each_byte_once_and_joins_what_comes_back() -> None:
    rng = random.Random(1)
    free, size = FreeList(1000), 1000
    taken: dict[int, int] = {}
    for _ in range(5000):
        if taken and rng.random() < 0.5:
            offset = rng.choice(list(taken))
            free.give(offset, taken.pop(offset))
        elif (offset_or_none := free.take(length := rng.randint(1, 200))) is not None:
            taken[offset_or_none] = length
        edges = sorted([*taken.items(), *free._holes])
        assert edges[0][0] == 0 and sum(edges[-1]) == size
        assert all(sum(left) == right[0] for left, right in itertools.pairwise(edges))
        assert all(sum(left) < right[0] for left, right in itertools.pairwise(free._holes))
    for offset, length in taken.items():
        free.give(offset, length)
    assert free.take(1000) == 0


def test_an_arena_reuses_the_pages_it_has_touched() -> None:
    arena = Arena(lambda fd: None)
    frame = bytes(MEGABYTE)
    assert arena.place([frame]) is None  # and a segment is announced
    arena.on_mapped(True)
    offsets = set()
    for _ in range(20):
        placed = arena.place([b"small", frame])
        assert placed is not None and placed.inline == [b"small"]
        offsets.add(placed.entries[0].offset)
        arena.free(placed.entries[0].region)
    assert offsets == {0}
    arena.close()


def test_an_arena_that_cannot_announce_or_be_mapped_goes_on_inline() -> None:
    def fail(fd: int) -> None:
        raise Broken("gone")

    num_fds = len(os.listdir("/proc/self/fd"))
    arena = Arena(fail)
    assert arena.place([bytes(MEGABYTE)]) is None
    arena.close()
    refused = Arena(lambda fd: None)
    assert refused.place([bytes(MEGABYTE)]) is None
    refused.on_mapped(False)
    assert refused.place([bytes(MEGABYTE)]) is None
    with pytest.raises(WireError):
        refused.on_mapped(True)
    refused.close()
    assert len(os.listdir("/proc/self/fd")) == num_fds
