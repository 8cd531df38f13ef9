"""Reads single tensors out of a Hugging Face checkpoint directory: nothing but what is asked for leaves the disk."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from asyncpipe.errors import Invalid

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
PREFIXES = ("", "model.")  # causal language models put "model." before the decoder's names, bare decoders do not


class _TensorFile(Protocol):
    def get_tensor(self, name: str) -> torch.Tensor: ...


class _BinFile:
    """A `.bin` file, mapped into memory; `weights_only` keeps code out of it."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def keys(self) -> list[str]:
        return list(self._tensors)


class Checkpoint:
    """Use in `with`. Opens only the files that hold a tensor that is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._file_of = _locate_tensors(path, self._open_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called `name`, with or without OPT's "model." prefix. Raises Invalid unless it is there in `shape`."""
        full_name = next((prefix + name for prefix in PREFIXES if prefix + name in self._file_of), None)
        if full_name is None:
            raise Invalid(f"{self.path}: tensor {name} is missing")
        file: _TensorFile = self._open_file(self._file_of[full_name])
        try:
            tensor = file.get_tensor(full_name)
        except (SafetensorError, RuntimeError) as error:
            raise Invalid(f"{self.path}: tensor {name} cannot be read: {error}") from None
        if tuple(tensor.shape) != shape:
            raise Invalid(f"{self.path}: tensor {name} has shape {tuple(tensor.shape)}; config.json says {shape}")
        return tensor

    def _open_file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = _open_tensor_file(self.path / name, self._stack)
        return self._open[name]


def _open_tensor_file(path: Path, stack: ExitStack) -> Any:
    try:
        if path.suffix == ".safetensors":
            return stack.enter_context(safe_open(path, framework="pt"))
        return _BinFile(path)
    except (OSError, SafetensorError) as error:
        raise Invalid(f"{path} cannot be read: {error}") from None
    except Exception as error:  # torch.load raises whatever its unpickler met
        raise Invalid(f"{path} is not a checkpoint that can be read safely: {str(error).splitlines()[0]}") from None


def _locate_tensors(path: Path, open_file: Any) -> dict[str, str]:
    """From tensor name to file name."""
    for single in (SAFETENSORS, PICKLED):
        index = path / f"{single}.index.json"
        if index.is_file():
            weight_map: dict[str, str] = _read_json(index)["weight_map"]
            return weight_map
        if (path / single).is_file():
            return dict.fromkeys(open_file(single).keys(), single)
    raise Invalid(f"{path} holds no weights: no {SAFETENSORS} or {PICKLED}, nor an index of either")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises Invalid."""
    return _read_json(path / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Invalid(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise Invalid(f"{path} is not a JSON object")
    return value
