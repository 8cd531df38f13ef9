"""What the C libraries below a worker are told, unless its environment says otherwise."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncpipe.errors import Invalid
from asyncpipe.policy import Policy
from asyncpipe.wire.messages import LoadStage
from asyncpipe_workers import loading
from asyncpipe_workers.c_runtime import SPIN_COUNT, prepare_c_runtime

FREED_BYTES = 24 << 20
KEPT_AFTER = f"""
import os
from asyncpipe_workers.c_runtime import keep_freed_memory, prepare_c_runtime

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

prepare_c_runtime()
keep_freed_memory()
before = resident_bytes()
block = bytearray({FREED_BYTES})
block[::4096] = b"x" * len(block[::4096])
del block
print(resident_bytes() - before)
"""

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="there is no mallopt in this C library")


def kept_bytes(**environment: str) -> int:
    """Of a block that has been freed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    argv = [sys.executable, "-c", KEPT_AFTER]
    return int(subprocess.run(argv, env=env | environment, check=True, capture_output=True, timeout=60).stdout)


@glibc
def test_memory_that_was_freed_is_kept() -> None:
    assert kept_bytes() > FREED_BYTES * 0.9


@glibc
@pytest.mark.parametrize(
    "environment", [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}]
)
def test_what_the_environment_says_of_memory_is_respected(environment: dict[str, str]) -> None:
    assert kept_bytes(**environment) < FREED_BYTES * 0.1


def test_threads_wait_briefly_for_each_other_unless_the_environment_says_how() -> None:
    env: dict[str, str] = {}
    prepare_c_runtime(env)
    assert env == {"GOMP_SPINCOUNT": SPIN_COUNT}
    for theirs in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        env = dict(theirs)
        prepare_c_runtime(env)
        assert env == theirs


def test_a_worker_says_so_before_the_library_is_there() -> None:
    code = (
        "from asyncpipe_workers.cli import main\n"
        "assert main(['--coordinator', 'tcp://127.0.0.1:1', '--search', '-1']) == 2\n"
        "import torch"
    )
    env = os.environ | {"OMP_DISPLAY_ENV": "verbose"}
    env.pop("GOMP_SPINCOUNT", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True, timeout=60)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's threads are not libgomp's here")
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr


@pytest.mark.parametrize(("percent_on_device", "keeps"), [(100.0, True), (50.0, False)])
def test_whoever_streams_weights_keeps_nothing(
    percent_on_device: float, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: kept.append(True))
    with pytest.raises(Invalid):
        plan = LoadStage(
            epoch=1,
            stage=0,
            num_stages=1,
            first_layer=0,
            last_layer=1,
            checkpoint=str(tmp_path),  # which holds no model
            config_json="{}",
            dtype="float32",
            max_context_len=16,
            max_sequences=1,
            kv_block_tokens=16,
            policy=Policy(w_gpu_percent=percent_on_device, w_cpu_percent=100.0 - percent_on_device),
        )
        loading.load_stage_compute(plan, device="cpu", model=str(tmp_path))
    assert bool(kept) == keeps
