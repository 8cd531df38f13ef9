"""Reads single tensors out of a checkpoint directory: nothing but what is asked for leaves the disk.

A checkpoint is a Hugging Face directory (safetensors, or `.bin`, whole or in shards), what `convert` makes of one, or a
FlexLLMGen weight directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from asyncpipe.errors import Invalid
from asyncpipe.policy import Compression
from asyncpipe.tensor_names import QUANTIZED_SUFFIXES, plain_name
from asyncpipe_workers.checkpoint_files import AGAIN, FileRange, TensorFile, open_tensor_file
from asyncpipe_workers.manifest import check_sizes, load_manifest
from asyncpipe_workers.numpy_weights import NumpyFile, is_numpy_directory, numpy_tensor_names

__all__ = ["Checkpoint", "FileRange", "TensorInfo", "read_config"]

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"


class TensorInfo(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Place(NamedTuple):
    file: str
    stored_name: str


class Checkpoint:
    """Use in `with`. Opens only the files that hold a tensor that is asked for.

    Names are plain ones, without "model." and its like. A tensor that is stored compressed is called `<name>.q4` or `.q8`.
    """

    def __init__(self, path: Path) -> None:
        """Raises Invalid when there are no weights, or a converted directory is not whole."""
        self.path = path
        self._files: dict[str, TensorFile] = {}
        manifest = load_manifest(path)
        if manifest is not None:
            check_sizes(path, manifest)
        self._quantization = None if manifest is None else manifest.quantization
        self._is_numpy = False
        self._places = {plain_name(place.stored_name): place for place in self._find_tensors()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()

    @property
    def quantization(self) -> Compression | None:
        """How the tensors called `<name>.q4` or `.q8` are compressed; None when there are none."""
        return self._quantization

    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def files(self) -> frozenset[str]:
        """Names of the files that hold tensors."""
        return frozenset(place.file for place in self._places.values())

    def stored_name(self, name: str) -> str:
        """With "model." or its like where the checkpoint has it."""
        return self._place(name).stored_name

    def describe(self, name: str) -> TensorInfo:
        """Without reading it. Raises Invalid."""
        place = self._place(name)
        found = self._locate(place)
        if found is None:
            tensor = self._open(place).read(place.stored_name)
            return TensorInfo(tensor.dtype, tuple(tensor.shape))
        return TensorInfo(found.dtype, found.shape)

    def locate(self, name: str, shape: tuple[int, ...]) -> FileRange | None:
        """Where the tensor's bytes are, to be read in place; None where they cannot be. Raises Invalid like `read`."""
        found = self._locate(self._place(name))
        if found is not None:
            self._check_shape(name, found.shape, shape)
        return found

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called `name`, mapped from its file. Raises Invalid unless it is there in `shape`."""
        place = self._place(name)
        self._locate(place)
        tensor = self._open(place).read(place.stored_name)
        self._check_shape(name, tuple(tensor.shape), shape)
        return tensor

    def _place(self, name: str) -> _Place:
        plain = plain_name(name)
        if place := self._places.get(plain):
            return place
        for suffix in QUANTIZED_SUFFIXES:
            if plain + suffix in self._places:
                raise Invalid(f"{self.path}: tensor {plain} is stored compressed, as {plain}{suffix}")
        raise Invalid(f"{self.path}: tensor {plain} is missing")

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise Invalid(f"{self.path}: tensor {name} has shape {found}; config.json says {expected}")

    def _locate(self, place: _Place) -> FileRange | None:
        try:
            return self._open(place).locate(place.stored_name)
        except KeyError:
            raise Invalid(
                f"{self.path}: the index says that {place.file} holds tensor {place.stored_name}, which it does not; {AGAIN}"
            ) from None

    def _open(self, place: _Place) -> TensorFile:
        if place.file not in self._files:
            path = self.path / place.file
            self._files[place.file] = NumpyFile(path, place.stored_name) if self._is_numpy else open_tensor_file(path)
        return self._files[place.file]

    def _find_tensors(self) -> list[_Place]:
        for single in (SAFETENSORS, PICKLED):
            index = self.path / f"{single}.index.json"
            if index.is_file():
                return _read_index(index)
            if (self.path / single).exists():
                file = self._files[single] = open_tensor_file(self.path / single)
                return [_Place(single, name) for name in file.names()]
        self._is_numpy = is_numpy_directory(self.path)
        if self._is_numpy:
            return [_Place(file, name) for file, name in numpy_tensor_names(self.path).items()]
        raise Invalid(
            f"{self.path} holds no weights: no {SAFETENSORS} or {PICKLED}, nor an index of either, nor FlexLLMGen's files"
        )


def _read_index(index: Path) -> list[_Place]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise Invalid(f"{index} has no weight_map; {AGAIN}")
    places = [_Place(str(file), name) for name, file in weight_map.items()]
    for place in places:
        if Path(place.file).name != place.file:
            raise Invalid(f"{index} names {place.file}, which is not a file beside it; {AGAIN}")
    return places


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises Invalid."""
    return read_json(path / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Raises Invalid unless the file holds a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Invalid(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise Invalid(f"{path} is not a JSON object")
    return value
