"""Machine code is compiled once on a machine, and again when what is kept of it is no good."""

from __future__ import annotations

from pathlib import Path

import pytest

kept_code = pytest.importorskip("asyncpipe_workers.compiled.kept_code")


class Compiler:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return b"code %d" % self.calls


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "asyncpipe" / kept_code.FOLDER


def test_the_same_is_compiled_once(folder: Path) -> None:
    compiler = Compiler()
    assert [kept_code.kept_code(what, compiler) for what in ("a", "a", "b", "a")] == [
        b"code 1",
        b"code 1",
        b"code 2",
        b"code 1",
    ]
    assert len(list(folder.iterdir())) == 2
    assert folder.stat().st_mode & 0o077 == 0, "what is executed is the user's alone"


@pytest.mark.parametrize("kept", [b"", b"short", b"\0" * 100])
def test_what_is_not_whole_is_compiled_again(folder: Path, kept: bytes) -> None:
    compiler = Compiler()
    kept_code.kept_code("a", compiler)
    (path,) = folder.iterdir()
    path.write_bytes(kept)
    assert [kept_code.kept_code("a", compiler) for _ in range(2)] == [b"code 2", b"code 2"]


def test_other_instructions_are_compiled_by_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    kept_code.kept_code("a", compiler)
    monkeypatch.setattr(kept_code, "_origin", lambda: "another processor")
    assert kept_code.kept_code("a", compiler) == b"code 2"


def test_without_a_folder_it_is_compiled_each_time(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_bytes(b"a file")
    compiler = Compiler()
    assert [kept_code.kept_code("a", compiler) for _ in range(2)] == [b"code 1", b"code 2"]


def test_the_oldest_are_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_code, "MAX_FILES", 3)
    compiler = Compiler()
    for number in range(5):
        kept_code.kept_code(str(number), compiler)
    assert len(list(folder.iterdir())) == 3
    assert kept_code.kept_code("4", compiler) == b"code 5"
