"""Safetensors headers, read without torch: is the file whole, and does it hold what the model needs?

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
Source: the safetensors repository, "Format".
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from asyncpipe.errors import Invalid
from asyncpipe_coordinator.tensor_shapes import Shapes

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
INDEX = "model.safetensors.index.json"
AGAIN = "download or save it again"


def check_tensors(path: Path, expected: Shapes) -> None:
    """Raises Invalid when a file is missing, cut short or damaged, or a tensor is missing or has another shape.

    `.bin` checkpoints can be read only with torch: their workers check them.
    """
    if (path / INDEX).is_file():
        files = _indexed_files(path)
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    elif any(path.glob("pytorch_model*.bin")):
        return
    else:
        raise Invalid(f"{path} holds no weights: no model.safetensors, {INDEX} or pytorch_model.bin")
    found: Shapes = {}
    for file in files:
        found |= {_plain(name): shape for name, shape in read_header(file).items()}
    for name, shape in expected.items():
        if name not in found:
            raise Invalid(f"{path}: tensor {name} is missing from its {len(files)} weight files")
        if found[name] != shape:
            raise Invalid(f"{path}: tensor {name} has shape {_text(found[name])}; config.json says {_text(shape)}")


def read_header(file: Path) -> Shapes:
    """Names and shapes of the tensors in `file`, whose size is checked against its header. Raises Invalid."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_len = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
            if header_len > min(MAX_HEADER_BYTES, size - 8):
                raise Invalid(f"{file} is not a whole safetensors file (its header is cut short); {AGAIN}")
            header = json.loads(stream.read(header_len))
    except OSError as error:
        raise Invalid(f"cannot read {file}: {error.strerror}") from None
    except ValueError:
        raise Invalid(f"{file} is damaged: its header is not JSON; {AGAIN}") from None
    return _checked_shapes(file, header, data_bytes=size - 8 - header_len)


def _checked_shapes(file: Path, header: Any, *, data_bytes: int) -> Shapes:
    try:
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        shapes: Shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items()}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise Invalid(f"{file} is damaged: its header does not describe tensors; {AGAIN}") from None
    if end != data_bytes:
        what = "cut short" if data_bytes < end else "longer than its header says"
        raise Invalid(f"{file} is {what}: it holds {data_bytes} bytes of data, its header describes {end}; {AGAIN}")
    return shapes


def _indexed_files(path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise Invalid(f"{path / INDEX} cannot be read, or has no weight_map; {AGAIN}") from None
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise Invalid(f"{path / INDEX} names {name}, which is not there; {AGAIN}")
    return [path / name for name in names]


def _plain(name: str) -> str:
    return name.removeprefix("model.")


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
