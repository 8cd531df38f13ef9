"""Conversions appear whole or not at all, whatever is in their way; and the command that runs them."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncpipe.errors import AsyncPipeError, Invalid
from asyncpipe.policy import Compression
from asyncpipe_coordinator import convert as convert_command
from asyncpipe_coordinator.cli import main as command
from asyncpipe_workers.checkpoint import Checkpoint
from asyncpipe_workers.convert import main
from asyncpipe_workers.convert_target import commit
from tests.checkpoints import make_opt
from tests.support import run
from tests.unit.test_checkpoint import all_tensors, save_numpy
from tests.unit.test_convert import converted, refusal, shards

MODULE = [sys.executable, "-m", "asyncpipe_workers.convert"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_opt(tmp_path_factory.mktemp("source"), layers=2)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# --- what is there already --------------------------------------------------------------------------------------------


def test_a_finished_conversion_is_not_done_again(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = converted(source, tmp_path / "target")
    before = target.stat()
    capfd.readouterr()
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("it writes"))
    converted(source, target)
    (event,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert event["is_done_before"] is True
    assert target.stat() == before


def test_other_settings_need_overwrite_and_replace_everything(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = converted(source, tmp_path / "target")
    (target / "stale.safetensors").write_bytes(b"x")
    for flags in (["--dtype", "float16"], ["--compress-weight"]):
        assert "is not empty: choose another target, or --overwrite" in refusal(capfd, source, target, *flags)
        converted(source, target, *flags, "--overwrite")
    assert not (target / "stale.safetensors").exists()
    with Checkpoint(target) as checkpoint:
        assert checkpoint.quantization == Compression(4, 64)
    assert os.listdir(tmp_path) == ["target"]


def test_a_source_that_has_changed_needs_overwrite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = make_opt(tmp_path / "source", layers=1)
    target = converted(source, tmp_path / "target")
    make_opt(source, layers=1, seed=1)
    assert "is not empty" in refusal(capfd, source, target)


def test_an_empty_target_is_taken_and_a_full_one_is_not(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "note").write_text("mine")
    assert "is not empty" in refusal(capfd, source, target)
    assert files_of(target) == {"note": b"mine"}
    (target / "note").unlink()
    converted(source, target)


def test_what_overwriting_would_destroy_is_protected(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "home" / "documents").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    copy = Path(shutil.copytree(source, tmp_path / "models" / "copy"))
    assert "holds a directory, documents" in refusal(capfd, source, tmp_path / "home", "--overwrite")
    assert "is a file" in refusal(capfd, source, tmp_path / "file", "--overwrite")
    assert "holds the source" in refusal(capfd, copy, tmp_path / "models", "--overwrite")
    assert "holds the source" in refusal(capfd, copy, copy, "--overwrite")
    assert "there is no directory" in refusal(capfd, source, tmp_path / "absent" / "target")
    assert "is a mount point" in refusal(capfd, source, "/proc", "--overwrite")


def test_a_broken_source_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = make_opt(tmp_path / "source", layers=2)
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1)
    assert "model.safetensors is cut short" in refusal(capfd, source, tmp_path / "target")
    assert os.listdir(tmp_path) == ["source"]


# --- disks that are full ----------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_found_out_before_anything_is_written(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    line = refusal(capfd, source, tmp_path / "target")
    assert f"no room for {tmp_path / 'target'}: it needs" in line
    assert "KiB, and 1000 bytes are free" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("full_after", [0, 100_000])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    full_after: int, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, [full_after]

    def write_until_full(fd: int, data: memoryview) -> int:
        if fd > 2:
            data = data[: min(room[0], 1000)]  # short writes, as a nearly full disk makes them
            room[0] -= len(data)
            if not data:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_until_full)
    line = refusal(capfd, source, tmp_path / "target")
    assert "no room for" in line
    assert os.listdir(tmp_path) == []


# --- killed and stopped -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With so many tensors that a conversion whose reports nobody reads has to wait."""
    return make_opt(tmp_path_factory.mktemp("many"), layers=24)


@contextmanager
def conversion(source: Path, target: Path, *flags: str, num_events: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is halted when it has reported so much; it cannot have ended, for nobody reads on."""
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    with (
        subprocess.Popen([*MODULE, str(source), str(target), *flags], stdout=write_fd, stderr=subprocess.PIPE) as process,
        open(read_fd, "rb", buffering=0) as stream,
    ):
        os.close(write_fd)
        for _ in range(num_events):
            while stream.read(1) != b"\n":
                assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        yield process
        process.kill()


@pytest.mark.parametrize("num_events", [1, 150, 250])
def test_a_killed_conversion_leaves_no_target_and_the_next_one_cleans_up(
    num_events: int, many_layers: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    with conversion(many_layers, target, num_events=num_events) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (partial,) = os.listdir(tmp_path)
    assert partial.startswith(f".target.partial-{process.pid}-")
    converted(many_layers, target)
    assert os.listdir(tmp_path) == ["target"]
    assert main(["--verify", str(target)]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_conversion_cleans_up_itself(number: signal.Signals, many_layers: Path, tmp_path: Path) -> None:
    with conversion(many_layers, tmp_path / "target", num_events=200) as process:
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=20) == 128 + number
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert os.listdir(tmp_path) == []


def test_a_stopped_overwrite_leaves_what_was_there(source: Path, many_layers: Path, tmp_path: Path) -> None:
    target = converted(source, tmp_path / "target")
    before = files_of(target)
    with conversion(many_layers, target, "--overwrite", num_events=200) as process:
        process.terminate()
        process.send_signal(signal.SIGCONT)
        process.wait(timeout=20)
    assert files_of(target) == before
    assert os.listdir(tmp_path) == ["target"]


def test_a_conversion_that_runs_is_not_cleaned_up_by_another(many_layers: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with conversion(many_layers, target, num_events=50) as process:
        (partial,) = tmp_path.iterdir()
        before = files_of(partial)
        converted(many_layers, target)
        assert files_of(partial) == before
        assert str(process.pid) in partial.name


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    partial, target = tmp_path / "partial", tmp_path / "target"
    for path in (partial, target):
        path.mkdir()
        (path / "file").write_text(path.name)
    with pytest.raises(OSError, match="not empty"):
        commit(partial, target, overwrite=False)
    assert files_of(target) == {"file": b"target"}
    commit(partial, target, overwrite=True)
    assert files_of(target) == {"file": b"partial"}
    assert os.listdir(tmp_path) == ["target"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_converts_and_says_what_it_did_as_json(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    numpy_source = save_numpy(source, tmp_path / "opt-np")
    flags = ["--compress-weight", "--group-size", "32", "--dtype", "float16", "--json"]
    assert command(["convert", str(numpy_source), str(tmp_path / "target"), *flags]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result.pop("seconds") > 0
    assert result == {
        "source": str(numpy_source),
        "target": str(tmp_path / "target"),
        "is_done_before": False,
        "tensors": len(all_tensors(source)) + 1,  # the head is there compressed too
        "bytes": sum(path.stat().st_size for path in shards(tmp_path / "target")),
        "dtype": "float16",
        "quantization": {"num_bits": 4, "group_size": 32},
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{source}"], "TARGET is needed"),
        (["{source}", "{tmp}/x", "--dtype", "int4"], "--dtype int4: use one of auto, float32"),
        (["{source}", "{tmp}/x", "--compress-weight", "--group-size", "7"], "groups of 7: use an even number"),
        (["{tmp}/absent", "{tmp}/x"], "there is no directory {tmp}/absent"),
        (["{tmp}", "{tmp}/x"], "{tmp} is not a checkpoint: it has no config.json"),
        (["{source}", "{tmp}/absent/x"], "there is no directory {tmp}/absent to make x in"),  # found by the worker
    ],
)
def test_a_mistake_is_one_clear_line(
    flags: list[str], message: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"source": source, "tmp": tmp_path}
    assert command(["convert", *(flag.format(**places) for flag in flags)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("asyncpipe-coordinator: error: ")
    assert message.format(**places) in line


WORKER_THAT = "import json, os, signal, sys, time; print(json.dumps({'event': 'begin', 'pid': os.getpid()}), flush=True);"


@pytest.mark.parametrize("deafness", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN);"])
def test_a_cancelled_command_ends_its_worker(deafness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_command, "KILL_AFTER_S", 0.2)
    pids: list[int] = []

    async def cancel() -> None:
        begun = asyncio.Event()

        def on_event(event: dict[str, Any]) -> None:
            pids.append(event["pid"])
            begun.set()

        code = f"import signal; {deafness} {WORKER_THAT} time.sleep(60)"
        task = asyncio.create_task(convert_command.run_worker([sys.executable, "-c", code], on_event))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancel())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize(
    ("code", "error_type", "message"),
    [
        ("print('noise', file=sys.stderr); sys.exit('python -m asyncpipe_workers.convert: error: why')", AsyncPipeError, "why"),
        ("print('python -m asyncpipe_workers.convert: error: why', file=sys.stderr); sys.exit(2)", Invalid, "^why$"),
        ("os.kill(os.getpid(), 9)", AsyncPipeError, "the conversion was killed by SIGKILL"),
        ("print('not JSON'); sys.exit(3)", AsyncPipeError, "the conversion exited with status 3"),
    ],
)
def test_what_ended_the_worker_is_said(code: str, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message) as error:
        run(convert_command.run_worker([sys.executable, "-c", WORKER_THAT + code], lambda _: None))
    assert isinstance(error.value, Invalid) == (error_type is Invalid)
