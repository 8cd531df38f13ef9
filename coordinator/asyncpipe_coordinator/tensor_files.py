"""Headers of weight files, read without torch: are the files whole, and do they hold what the model needs?

A safetensors file is 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
Source: the safetensors repository, "Format". FlexLLMGen's weight directories have a `.npy` file, without an extension, for each
tensor, and `decoder.layer_norm` for what Hugging Face calls `decoder.final_layer_norm`.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy.lib.format as npy

from asyncpipe.errors import Invalid
from asyncpipe.tensor_names import QUANTIZED_SUFFIXES, plain_name
from asyncpipe_coordinator.tensor_shapes import Shapes

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
INDEX = "model.safetensors.index.json"
NUMPY_EMBEDDING = "decoder.embed_tokens.weight"  # every weight directory of FlexLLMGen has it
AGAIN = "download or save it again"


def check_tensors(path: Path, expected: Shapes) -> None:
    """Raises Invalid when a file is missing, cut short or damaged, or a tensor is missing or has another shape.

    `.bin` checkpoints can be read only with torch: their workers check them.
    """
    if is_pickled(path):
        return
    if (path / INDEX).is_file():
        found = _read_headers(_indexed_files(path))
    elif (path / "model.safetensors").is_file():
        found = _read_headers([path / "model.safetensors"])
    elif (path / NUMPY_EMBEDDING).is_file():
        found = {name: shape for name in expected if (shape := _numpy_shape(path, name)) is not None}
    else:
        raise Invalid(f"{path} holds no weights: no model.safetensors, {INDEX}, pytorch_model.bin or {NUMPY_EMBEDDING}")
    for name, shape in expected.items():
        _check_shape(path, name, shape, found)


def is_pickled(path: Path) -> bool:
    """Its weights are in `.bin` files and no others."""
    has_others = any((path / name).is_file() for name in (INDEX, "model.safetensors"))
    return not has_others and any(path.glob("pytorch_model*.bin"))


def _check_shape(path: Path, name: str, expected: tuple[int, ...], found: Shapes) -> None:
    packed = next((found[name + suffix] for suffix in QUANTIZED_SUFFIXES if name + suffix in found), None)
    if name not in found and packed is None:
        raise Invalid(f"{path}: tensor {name} is missing from its weight files")
    if packed is not None and packed[:-1] == expected[:-1]:
        return  # how long a row of bytes is depends on the compression: workers check it
    shape = found.get(name, packed or ())
    if shape != expected:
        raise Invalid(f"{path}: tensor {name} has shape {_text(shape)}; config.json says {_text(expected)}")


def _read_headers(files: list[Path]) -> Shapes:
    return {plain_name(name): shape for file in files for name, shape in read_header(file).items()}


def _numpy_shape(path: Path, name: str) -> tuple[int, ...] | None:
    """Of the tensor's file, whose size is checked against its header; None when there is none. Raises Invalid."""
    file = path / name.replace("decoder.final_layer_norm.", "decoder.layer_norm.")
    try:
        with file.open("rb") as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
            num_bytes = stream.tell() + math.prod(shape) * dtype.itemsize
        size = file.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Invalid(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, SyntaxError, TokenError):
        raise Invalid(f"{file} is not a whole .npy file; {AGAIN}") from None
    if size != num_bytes:
        raise Invalid(f"{file} is cut short: it has {size} bytes, its header describes {num_bytes}; {AGAIN}")
    return tuple(shape)


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


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
