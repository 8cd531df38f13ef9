"""Which tensor goes where in a converted checkpoint, in which form: decided from names, shapes and dtypes alone.

There is one file for each decoder layer and one for everything else. Within a layer's file, what is used together lies
together: the attention's tensors before the feed-forward's, in each part matrices before vectors, and projections before norms.
With compression the head is there twice: as it is, and compressed for those who multiply it in that form.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from asyncpipe.errors import Invalid
from asyncpipe.model_shape import model_fields
from asyncpipe.policy import Compression, is_compressible
from asyncpipe.tensor_names import HEAD, TABLES, layer_name, quantized_suffix
from asyncpipe_workers.checkpoint import Checkpoint
from asyncpipe_workers.checkpoint_files import DTYPE_NAMES
from asyncpipe_workers.convert_files import make_header
from asyncpipe_workers.memory.quantization import make_codec

FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUTER_FILE = "outer.safetensors"

_QKV = ("qkv_proj", "c_attn", "q_proj", "k_proj", "v_proj", "out_proj", "o_proj")
_FEED_FORWARD = ("gate", "gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2", "fc1", "c_fc", "fc2", "c_proj")
_PROJECTIONS = (*_QKV, *_FEED_FORWARD)  # in the order of their use


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """`name`, `dtype` and `shape` are those in the target; a compressed tensor is rows of bytes there."""

    source_name: str
    source_shape: tuple[int, ...]
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_compressed: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """Tensors in the order of their bytes."""

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Plan:
    """`dtype` is that of every floating-point tensor that is not compressed."""

    dtype: str
    compression: Compression | None
    files: tuple[PlannedFile, ...]

    @property
    def num_tensors(self) -> int:
        return sum(len(file.tensors) for file in self.files)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def make_plan(checkpoint: Checkpoint, config: dict[str, Any], *, dtype: str, compression: Compression | None) -> Plan:
    """`dtype` may be "auto": the one that most of the checkpoint's bytes have. Raises Invalid for a damaged checkpoint."""
    if checkpoint.quantization is not None:
        raise Invalid(f"{checkpoint.path} is compressed already; convert the checkpoint that it was made of")
    names = sorted(checkpoint.names() - _copies(config))
    dtype = _most_common_dtype(checkpoint, names) if dtype == "auto" else dtype
    groups: dict[str, list[PlannedTensor]] = defaultdict(list)
    for name in names:
        groups[_file_of(name)].append(_plan_tensor(checkpoint, name, FLOAT_DTYPES[dtype], compression))
    if compression is not None:
        heads = [HEAD] if HEAD in names else [name for name in names if name in TABLES]
        groups[OUTER_FILE] += [_packed_tensor(checkpoint, head, compression) for head in heads]
    return Plan(dtype, compression, tuple(_plan_file(file, groups[file]) for file in sorted(groups)))


def _copies(config: dict[str, Any]) -> frozenset[str]:
    """A tied head is the embedding; some formats store it twice."""
    return frozenset([HEAD]) if model_fields(config).get("tie_word_embeddings", False) else frozenset()


def _most_common_dtype(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    num_bytes: Counter[torch.dtype] = Counter()
    for name in names:
        info = checkpoint.describe(name)
        num_bytes[info.dtype] += math.prod(info.shape) * info.dtype.itemsize
    floating = [dtype for dtype, _ in num_bytes.most_common() if dtype.is_floating_point]
    return next((name for name, dtype in FLOAT_DTYPES.items() if dtype in floating[:1]), "float32")


def _file_of(name: str) -> str:
    found = layer_name(name)
    return OUTER_FILE if found is None else f"layer-{found.layer:05d}.safetensors"


def _plan_file(file: str, tensors: list[PlannedTensor]) -> PlannedFile:
    ordered = tuple(sorted(tensors, key=_order))
    return PlannedFile(file, make_header((tensor.name, tensor.dtype, tensor.shape) for tensor in ordered), ordered)


def _order(tensor: PlannedTensor) -> tuple[Any, ...]:
    found = layer_name(tensor.source_name)
    if found is None:
        return (tensor.source_name,)
    parts = found.rest.split(".")
    return (
        not found.is_attention,
        _expert(parts),
        len(tensor.source_shape) < 2,
        next((rank for rank, name in enumerate(_PROJECTIONS) if name in parts), len(_PROJECTIONS)),
        parts[:-1],
        parts[-1] != "weight",
        parts[-1],
    )


def _expert(parts: list[str]) -> int:
    """An expert's number; those of the router and the rest come first."""
    return next((int(part) for part in parts if part.isdecimal()), -1)


def _plan_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype, compression: Compression | None) -> PlannedTensor:
    stored_dtype, shape = checkpoint.describe(name)
    if compression is not None and stored_dtype.is_floating_point and is_compressible(name, shape):
        return _packed_tensor(checkpoint, name, compression)
    if not stored_dtype.is_floating_point:
        dtype = stored_dtype
    if dtype not in DTYPE_NAMES:
        raise Invalid(f"{checkpoint.path}: tensor {name} has dtype {dtype}, which safetensors files cannot hold")
    return PlannedTensor(name, shape, checkpoint.stored_name(name), dtype, shape, is_compressed=False)


def _packed_tensor(checkpoint: Checkpoint, name: str, compression: Compression) -> PlannedTensor:
    shape = checkpoint.describe(name).shape
    packed = (*shape[:-1], make_codec(compression).packed_size(shape[-1]))
    packed_name = checkpoint.stored_name(name) + quantized_suffix(compression.num_bits)
    return PlannedTensor(name, shape, packed_name, torch.uint8, packed, is_compressed=True)
