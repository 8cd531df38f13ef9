"""FlexLLMGen's weight directories: one `.npy` file without an extension for each tensor, named after it.

They have `decoder.layer_norm` for what Hugging Face calls `decoder.final_layer_norm`, and no configuration: config.json and the
tokenizer's files of the same model belong beside them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from tokenize import TokenError

import numpy.lib.format as npy
import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.checkpoint_files import AGAIN, FileRange, read_range, reading

EMBEDDING = "decoder.embed_tokens.weight"  # every such directory has it
SUFFIXES = (".weight", ".bias")
DTYPES = {
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "<i4": torch.int32,
    "<i8": torch.int64,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}


def is_numpy_directory(path: Path) -> bool:
    return (path / EMBEDDING).is_file()


def numpy_tensor_names(path: Path) -> dict[str, str]:
    """From file name to the name that a Hugging Face checkpoint has for the tensor."""
    files = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
    return {file: _hugging_face_name(file) for file in files}


def _hugging_face_name(file: str) -> str:
    if not file.startswith("decoder."):
        return file  # lm_head.weight
    return "model." + file.replace("decoder.layer_norm.", "decoder.final_layer_norm.")


class NumpyFile:
    """One tensor. Raises Invalid for what is no whole array of numbers, row after row."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        self._range = _find_array(path)

    def names(self) -> Collection[str]:
        return (self._name,)

    def locate(self, name: str) -> FileRange:
        if name != self._name:
            raise KeyError(name)
        return self._range

    def read(self, name: str) -> torch.Tensor:
        return read_range(self.locate(name))


def _find_array(path: Path) -> FileRange:
    with reading(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            version = npy.read_magic(stream)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, is_fortran, dtype = read_header(stream)
        except (ValueError, KeyError, SyntaxError, TokenError) as error:
            raise Invalid(f"{path} is not a whole .npy file: {type(error).__name__}; {AGAIN}") from None
        offset = stream.tell()
    if dtype.str not in DTYPES:
        raise Invalid(f"{path} has dtype {dtype}; supported: {', '.join(map(str, DTYPES.values()))}")
    if is_fortran:
        raise Invalid(f"{path} is in Fortran order; save it with numpy.ascontiguousarray")
    found = FileRange(path, offset, math.prod(shape) * dtype.itemsize, DTYPES[dtype.str], tuple(shape))
    if min(shape, default=0) < 0 or size != offset + found.num_bytes:
        what = "cut short" if size < offset + found.num_bytes else "longer than its header says"
        raise Invalid(f"{path} is {what}: it has {size} bytes, its header describes {offset + found.num_bytes}; {AGAIN}")
    return found
