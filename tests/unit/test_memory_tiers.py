"""The pieces that streaming is made of: the ring, files on disk, the log of what moved, groups of steps."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from asyncpipe.errors import Closed, Invalid, Timeout
from asyncpipe.wire.messages import Chunk, Delta, Step
from asyncpipe_workers.grouping import AllThatWait, compatible
from asyncpipe_workers.memory import transfers
from asyncpipe_workers.memory.disk import BLOCK_BYTES, DiskFile, DiskFiles, ScratchFile, new_buffer
from asyncpipe_workers.memory.ring import Ring
from asyncpipe_workers.memory.transfers import Cargo, TransferLog
from asyncpipe_workers.output import ArrivedStep

# --- the ring ---


def ring_of(blocks: int, *, poison: bool = False) -> Ring:
    return Ring(new_buffer(blocks * BLOCK_BYTES), poison=poison)


def test_regions_of_the_ring_never_overlap() -> None:
    ring, live = ring_of(10), []
    for step in range(200):
        num_bytes = (step * 7919) % (4 * BLOCK_BYTES) + 1
        while len(live) > 1:
            ring.free(live.pop(0))
        region = ring.allocate(num_bytes)
        assert region.end - region.start >= num_bytes
        assert region.end <= len(ring.buffer)
        assert all(region.end <= other.start or other.end <= region.start for other in live)
        live.append(region)


def test_the_ring_waits_for_room_and_a_close_ends_the_wait() -> None:
    ring = ring_of(4)
    first = ring.allocate(3 * BLOCK_BYTES)
    got: list[object] = []
    waiter = threading.Thread(target=lambda: got.append(ring.allocate(2 * BLOCK_BYTES)))
    waiter.start()
    waiter.join(timeout=0.05)
    assert not got
    ring.free(first)
    waiter.join(timeout=5)
    assert got

    def expect_closed() -> None:
        with pytest.raises(Closed):
            ring.allocate(4 * BLOCK_BYTES)
        got.append("closed")

    closed = threading.Thread(target=expect_closed)
    closed.start()
    ring.close()
    closed.join(timeout=5)
    assert got[-1] == "closed"


def test_a_freed_region_is_poisoned_and_cannot_be_freed_again() -> None:
    ring = ring_of(4, poison=True)
    region = ring.allocate(BLOCK_BYTES)
    memory = ring.bytes_of(region)
    memory.zero_()
    ring.free(region)
    assert bool(memory.view(torch.float32).isnan().all())
    with pytest.raises(Invalid, match="twice"):
        ring.free(region)


def test_what_does_not_fit_the_ring_is_refused() -> None:
    with pytest.raises(Invalid, match="in a buffer of"):
        ring_of(2).allocate(3 * BLOCK_BYTES)


# --- files ---


def filled(path: Path, num_bytes: int) -> bytes:
    data = os.urandom(num_bytes)
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("num_bytes", [BLOCK_BYTES, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES + 17])
def test_whole_blocks_are_read_to_the_end_of_a_file(num_bytes: int, tmp_path: Path) -> None:
    data = filled(tmp_path / "file", num_bytes)
    target = new_buffer(num_bytes)
    file = DiskFile(tmp_path / "file")
    file.read(0, target.numpy().data)
    assert target[:num_bytes].numpy().tobytes() == data
    file.close()


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "shard", 2 * BLOCK_BYTES)
    with DiskFiles() as files, pytest.raises(Invalid, match=r"shard is cut short"):
        files[tmp_path / "shard"].read(0, new_buffer(4 * BLOCK_BYTES).numpy().data)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with DiskFiles() as files, pytest.raises(Invalid, match="no-such: No such file"):
        _ = files[tmp_path / "no-such"]
    with DiskFiles() as files, pytest.raises(Invalid, match="cannot read"):
        files[tmp_path].read(0, new_buffer(BLOCK_BYTES).numpy().data)


def test_a_scratch_file_has_no_name_and_gives_back_what_was_written(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path / "new", 2 * BLOCK_BYTES, what="weights")
    data = os.urandom(5000)
    file.write(100, memoryview(data))
    file.flush()
    target = bytearray(5000)
    file.read(100, memoryview(target))
    assert bytes(target) == data
    whole = new_buffer(2 * BLOCK_BYTES)
    file.reader.read(0, whole.numpy().data)
    assert whole[100:5100].numpy().tobytes() == data
    assert list((tmp_path / "new").iterdir()) == []
    file.close()


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Invalid, match=r"no room for 8192 bytes of weights: No space left"):
        ScratchFile(tmp_path, 8192, what="weights")


def test_an_offload_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Invalid, match=r"--offload-dir .*file"):
        ScratchFile(tmp_path / "file", 0, what="weights")


# --- the log ---


def test_waits_and_moves_are_counted_by_what_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    log = TransferLog()
    with log.moving(Cargo.WEIGHTS, 10), log.moving(Cargo.CACHE_LOADS, 5):
        pass
    done: Future[int] = Future()
    done.set_result(3)
    assert log.wait(Cargo.WEIGHTS, done, "a result") == 3
    report = log.report()
    assert (report.weights.num_bytes, report.cache_loads.num_bytes, report.num_bytes) == (10, 5, 15)
    assert report.wait_s == 0.0
    assert len(log.take_moves()) == 2
    assert log.take_moves() == []
    monkeypatch.setattr(transfers, "TRANSFER_TIMEOUT_S", 0.01)
    with pytest.raises(Timeout, match=r"layer 3's weights did not arrive within 0\.01 s"):
        log.wait(Cargo.WEIGHTS, Future(), "layer 3's weights")
    assert log.report().weights.wait_s >= 0.01


# --- groups of steps ---


def step(micro_batch: int, **delta: object) -> Step:
    return Step(epoch=1, micro_batch=micro_batch, step=0, delta=Delta(**delta))  # type: ignore[arg-type]


MEMBERS = {0: [1, 2], 1: [3, 4], 2: [5]}


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ([step(0)], 1),
        ([step(0), step(1), step(2)], 3),
        ([step(0), step(1, left=(2,))], 1),
        ([step(0, chunks=(Chunk(9, 5),)), step(1), step(2, chunks=(Chunk(9, 5),))], 2),
        ([step(0, parted=(2,)), step(1, adopted=(2,))], 1),
        ([step(0), step(0)], 1),
    ],
)
def test_only_steps_of_different_sequences_go_together(steps: list[Step], count: int) -> None:
    assert compatible(steps, lambda micro_batch: MEMBERS[micro_batch]) == count


def test_micro_batches_of_the_last_passes_are_awaited_a_little() -> None:
    grouping = AllThatWait(lambda micro_batch: MEMBERS[micro_batch], lingers=True)
    first, second = ArrivedStep(step(0), 0), ArrivedStep(step(1), 0)
    grouping.done([0], 1.0)
    grouping.done([1], 1.0)
    looks = iter([[first], [first], [first, second]])
    assert grouping.choose(lambda: next(looks)) == 2
    grouping.done([0, 1], 0.01)
    assert grouping.choose(lambda: [first]) == 1, "not for ever"
