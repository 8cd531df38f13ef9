"""The `batch` command: a file of requests in, every line exactly once out, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asyncpipe_workers.sim import simulated_tokens

DEVICE = "sim:layer_ms=1,jitter=0.5"


def arguments(folder: Path, *more: object) -> list[str]:
    command = [sys.executable, "-m", "asyncpipe_coordinator", "batch", "--stages", "2", "--device", DEVICE]
    return [*command, "--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl"), *map(str, more)]


def run_batch(folder: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments(folder, *more), capture_output=True, text=True, timeout=60, check=False)


def write_input(folder: Path, count: int, *, bad: tuple[int, ...] = ()) -> None:
    lines = []
    for number in range(1, count + 1):
        request = {"prompt_token_ids": [5, number], "max_new_tokens": 1 + number % 7, "custom_id": f"id-{number}"}
        lines.append('{"prompt": ' if number in bad else json.dumps(request))
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_output(folder: Path, count: int, *, bad: tuple[int, ...] = (), is_ordered: bool = True) -> None:
    found = results(folder / "out.jsonl")
    lines = [result["line"] for result in found]
    expected = [number for number in range(1, count + 1) if number not in bad]
    assert (lines if is_ordered else sorted(lines)) == expected, "each line exactly once"
    for result in found:
        assert result["token_ids"] == simulated_tokens([5, result["line"]], 1 + result["line"] % 7)
        assert result["custom_id"] == f"id-{result['line']}"
    errors = folder / "out.jsonl.errors.jsonl"
    assert [error["line"] for error in results(errors)] == list(bad) if bad else not errors.exists()


def test_lines_come_out_in_order_with_bad_ones_reported_by_number(tmp_path: Path) -> None:
    write_input(tmp_path, 150, bad=(3, 77))
    done = run_batch(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    check_output(tmp_path, 150, bad=(3, 77))
    summary = json.loads(done.stdout)["summary"]
    assert (summary["lines"], summary["requests"], summary["line_errors"]) == (150, 150, 2)
    assert summary["completion_tokens"] == sum(1 + n % 7 for n in range(1, 151) if n not in (3, 77))
    again = run_batch(tmp_path)
    assert "150 lines, 150 of them done before, 2 with errors" in again.stderr
    check_output(tmp_path, 150, bad=(3, 77))


@pytest.mark.parametrize("flag", [(), ("--unordered",)], ids=["in order", "as finished"])
def test_killed_at_any_moment_and_run_again_every_line_is_there_once(tmp_path: Path, flag: tuple[str, ...]) -> None:
    write_input(tmp_path, 1500, bad=(700,))
    rng = random.Random(3)
    num_kills = 0
    while True:
        command = arguments(tmp_path, "--quiet", "--max-sequences", 6, *flag)  # so few that it takes some seconds
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, said = process.communicate(timeout=0.6 + rng.random() * 0.8)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL if num_kills < 5 else signal.SIGCONT)
            num_kills += 1
            _, said = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said.decode()
    assert num_kills >= 2, "the job was meant to take longer"
    check_output(tmp_path, 1500, bad=(700,), is_ordered=not flag)


def test_a_worker_that_dies_costs_no_line(tmp_path: Path) -> None:
    write_input(tmp_path, 1200)
    with subprocess.Popen(arguments(tmp_path, "--quiet"), stderr=subprocess.PIPE) as process:
        deadline_s = time.monotonic() + 20
        while not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").stat().st_size:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        os.kill(worker_of(process.pid), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said.decode()
    check_output(tmp_path, 1200)


def worker_of(parent: int) -> int:
    """Some worker process of the coordinator `parent`."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(next(pid for pid in children if b"asyncpipe_workers" in Path(f"/proc/{pid}/cmdline").read_bytes()))


def test_another_input_or_other_options_do_not_continue_an_output(tmp_path: Path) -> None:
    write_input(tmp_path, 5)
    assert run_batch(tmp_path).returncode == 0
    for change, flags in ((lambda: None, ("--temperature", 0.5)), (lambda: write_input(tmp_path, 6), ())):
        change()
        refused = run_batch(tmp_path, *flags)
        assert refused.returncode == 2
        assert len(refused.stderr.strip().splitlines()) == 1
        assert "--overwrite" in refused.stderr
    assert run_batch(tmp_path, "--overwrite").returncode == 0
    check_output(tmp_path, 6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--input", "missing.jsonl", "--output", "o.jsonl"), "missing.jsonl"),
        (("--output", "o.jsonl"), "--input FILE is needed"),
        (("--input", "missing.jsonl"), "--output FILE is needed"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    command = [sys.executable, "-m", "asyncpipe_coordinator", "batch", "--device", DEVICE, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
