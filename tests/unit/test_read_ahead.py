"""Tensors that are read before they are asked for: in their order, within a bound, and with their errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.memory import read_ahead
from asyncpipe_workers.memory.read_ahead import ReadAhead
from asyncpipe_workers.memory.stored_form import StoredForm

DEADLINE_S = 10.0
ROW = 100  # bytes of a tensor


def form(name: str, num_rows: int = 1) -> StoredForm:
    return StoredForm(name, (num_rows, ROW), torch.uint8, None, None)


def reading(disk: Disk, forms: list[StoredForm]) -> ReadAhead:
    ahead = ReadAhead(disk.read)
    ahead.expect(forms)
    return ahead


class Disk:
    """Reads when it is let, and knows what it has begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go_on = threading.Semaphore(0)
        self.has_begun = threading.Semaphore(0)

    def read(self, form: StoredForm) -> torch.Tensor:
        self.begun.append(form.name)
        self.has_begun.release()
        assert self.go_on.acquire(timeout=DEADLINE_S)
        if form.name == "broken":
            raise Invalid("cut short")
        return torch.full((form.num_rows, ROW), int(form.name))

    def wait_for_begun(self, count: int) -> None:
        for _ in range(count):
            assert self.has_begun.acquire(timeout=DEADLINE_S)


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.go_on.release(100)


def test_what_comes_is_read_in_order_while_nobody_asks(disk: Disk) -> None:
    disk.go_on.release(3)
    ahead = reading(disk, [form(str(n)) for n in range(3)])
    disk.wait_for_begun(3)
    assert disk.begun == ["0", "1", "2"]
    assert [int(ahead.take(form(str(n)))[0, 0]) for n in (1, 0, 2)] == [1, 0, 2]  # type: ignore[index]
    assert ahead.take(form("1")) is None, "it has been taken"
    assert ahead.take(form("9")) is None
    ahead.close()


def test_no_more_is_read_than_may_wait(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 3 * ROW)
    disk.go_on.release(100)
    ahead = reading(disk, [form("0"), form("1", 2), form("2"), form("3", 9), form("4")])
    disk.wait_for_begun(2)
    assert not disk.has_begun.acquire(timeout=0.05)
    ahead.take(form("0"))
    disk.wait_for_begun(1)
    assert disk.begun == ["0", "1", "2"]
    ahead.take(form("1", 2))
    assert not disk.has_begun.acquire(timeout=0.05), "the next is too large to come with another"
    ahead.take(form("2"))
    disk.wait_for_begun(1)
    assert disk.begun[-1] == "3"
    ahead.take(form("3", 9))
    assert ahead.take(form("4")) is not None
    ahead.close()


def test_an_error_comes_to_who_asks_and_the_rest_is_there(disk: Disk) -> None:
    disk.go_on.release(3)
    ahead = reading(disk, [form("0"), form("broken"), form("2")])
    assert ahead.take(form("0")) is not None
    with pytest.raises(Invalid, match="cut short"):
        ahead.take(form("broken"))
    assert ahead.take(form("2")) is not None
    ahead.close()


def test_closing_ends_the_thread_with_what_it_is_at(disk: Disk) -> None:
    threads = set(threading.enumerate())
    ahead = reading(disk, [form(str(n)) for n in range(5)])
    disk.wait_for_begun(1)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    disk.go_on.release(5)
    closing.join(DEADLINE_S)
    ahead.close()
    assert disk.begun == ["0"]
    assert set(threading.enumerate()) <= threads
    assert ahead.take(form("0")) is None
