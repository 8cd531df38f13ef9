"""Files as memory: the right bytes, side by side where the file has them so, private, and let go of with the last tensor."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncpipe_workers.checkpoint import Checkpoint, FileRange
from asyncpipe_workers.convert import Job, convert
from asyncpipe_workers.memory import mapped
from asyncpipe_workers.memory.disk import DiskFiles
from asyncpipe_workers.memory.mapped import MappedRanges
from asyncpipe_workers.memory.quantization import RowCodec
from asyncpipe_workers.memory.source import CheckpointSource
from asyncpipe_workers.models.kernels import FloatLinears
from asyncpipe_workers.models.quantized import QuantizedLinears
from asyncpipe_workers.models.weights import Resident, joined
from tests.checkpoints import make_opt

SIZE = 3 * 4096 + 100


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    return path


def part(path: Path, start: int, end: int) -> FileRange:
    return FileRange(path, start, end - start, torch.uint8, (end - start,))


def mappings(path: Path) -> list[range]:
    """The addresses at which this process has the file, or those in the directory."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    bounds = (line.split()[0].split("-") for line in lines if str(path) in line)
    return [range(int(first, 16), int(last, 16)) for first, last in bounds]


@pytest.mark.parametrize(("start", "end"), [(0, SIZE), (4096, 8192), (1, 2), (4095, 4097), (8000, SIZE), (50, 50)])
def test_a_range_holds_what_the_file_does(start: int, end: int, file: Path) -> None:
    assert MappedRanges().read(part(file, start, end)).numpy().tobytes() == file.read_bytes()[start:end]


def test_ranges_that_follow_each_other_are_one_piece_of_memory(file: Path) -> None:
    places = [part(file, 10, 100), part(file, 100, 5000), part(file, 5000, 5002), part(file, 6000, 7000)]
    ranges = MappedRanges()
    ranges.expect(places)
    rows = [ranges.read(place).view(-1, 2) for place in places]
    assert len(joined(rows[:3])) == 1
    assert joined(rows[:3])[0].numpy().tobytes() == file.read_bytes()[10:5002]
    assert len(joined(rows)) == 2
    assert len(mappings(file)) == 2


def test_what_is_written_stays_here(file: Path) -> None:
    before = file.read_bytes()
    memory, other = (MappedRanges().read(part(file, 0, SIZE)) for _ in range(2))
    memory.zero_()
    assert file.read_bytes() == before
    assert other.numpy().tobytes() == before


def test_the_last_tensor_lets_go_of_the_file(file: Path) -> None:
    ranges = MappedRanges()
    ranges.expect([part(file, 0, 100), part(file, 100, 200)])
    first, second = (ranges.read(part(file, *bounds)) for bounds in ((0, 100), (100, 200)))
    del first
    assert len(mappings(file)) == 1
    del second
    gc.collect()
    assert not mappings(file)


def test_what_cannot_be_read_is_an_error(tmp_path: Path, file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MappedRanges().read(part(tmp_path / "none", 0, 10))
    with pytest.raises(OSError, match="weights is cut short"):
        MappedRanges().read(part(file, 0, SIZE + 1))
    ranges, parts = MappedRanges(), [part(file, 0, 4096), part(file, 4096, SIZE)]
    ranges.expect(parts)
    ranges.read(parts[0])
    os.truncate(file, 4096)  # the kernel says the same of a broken disk
    with pytest.raises(OSError, match="reading it failed"):
        ranges.read(parts[1])


def test_an_old_kernel_reads_page_by_page(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(mapped, "_madvise", lambda: refuse)
    assert MappedRanges().read(part(file, 7, SIZE)).numpy().tobytes() == file.read_bytes()[7:]


def test_what_cannot_be_mapped_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mapped.mmap, "mmap", refuse)
    assert MappedRanges().read(part(file, 4099, SIZE - 1)).numpy().tobytes() == file.read_bytes()[4099 : SIZE - 1]


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("quantize", [False, True])
def test_weights_are_multiplied_where_the_file_is_mapped(quantize: bool, tmp_path: Path) -> None:
    """Those of queries, keys and values as one, without a copy, as a converted checkpoint has them."""
    codec, size = RowCodec(), 32
    whole, converted = make_opt(tmp_path / "whole"), tmp_path / "converted"
    convert(Job(whole, converted, dtype="float16", compression=codec.compression if quantize else None), lambda _: None)
    rows = [(f"decoder.layers.0.self_attn.{name}_proj", size) for name in "qkv"]
    maker = QuantizedLinears(codec, torch.device("cpu"), torch.float32) if quantize else FloatLinears(torch.float32)
    with Checkpoint(converted) as checkpoint, DiskFiles(direct=False) as files:
        source = CheckpointSource(checkpoint, files)
        source.expect(source.form(f"{name}.weight", (size, size), codec if quantize else None) for name, _ in rows)
        weights = Resident(source, dtype=torch.float32, device=torch.device("cpu"), make_linear=maker)
        linear: Any = weights.linear(rows, size, bias=False)
        source.close()
    assert any(linear._weight.data_ptr() in memory for memory in mappings(converted))
