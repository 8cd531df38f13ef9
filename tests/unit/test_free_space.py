"""What a machine says of its memory, as what models may still use of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncpipe import free_space

MEMINFO = """\
MemTotal:       24000000 kB
MemAvailable:    {available} kB
Mapped:          {mapped} kB
"""


@pytest.fixture
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "meminfo"
    monkeypatch.setattr(free_space, "MEMINFO", path)
    monkeypatch.setattr(free_space, "group_settings", lambda *_: [])
    return path


def test_mapped_files_are_not_free(meminfo: Path) -> None:
    meminfo.write_text(MEMINFO.format(available=1000, mapped=300), encoding="ascii")
    assert free_space.free_memory_bytes() == 700 * 1024
    meminfo.write_text(MEMINFO.format(available=1000, mapped=3000), encoding="ascii")
    assert free_space.free_memory_bytes() == 0


def test_a_system_that_does_not_say_has_no_number(meminfo: Path) -> None:
    assert free_space.free_memory_bytes() is None
    meminfo.write_text("MemTotal: 24000000 kB\n", encoding="ascii")
    assert free_space.free_memory_bytes() is None


def test_a_control_group_may_leave_less(meminfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo.write_text(MEMINFO.format(available=1000, mapped=0), encoding="ascii")
    monkeypatch.setattr(free_space, "group_settings", lambda *_: [("500000", "400000"), ("max", "7")])
    assert free_space.free_memory_bytes() == 100000
