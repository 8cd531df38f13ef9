"""Tensors on the wire: a small reference in the message, the bytes in a frame of their own.

A `Tensor` is dtype, shape and a C-contiguous buffer: enough to travel, and to become a numpy array or (in a worker, which
has torch) a torch tensor without a copy. bfloat16, which numpy does not know, travels by name like every other dtype.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from asyncpipe.errors import Invalid, WireError

MAX_RANK = 8
MAX_DIM = 2**40
MAX_TENSOR_FRAMES = 64

Buffer = bytes | bytearray | memoryview


class DType(enum.StrEnum):
    BOOL = "bool"
    UINT8 = "uint8"
    INT8 = "int8"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"

    @property
    def itemsize(self) -> int:
        return 2 if self is DType.BFLOAT16 else np.dtype(self.value).itemsize


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """What a message carries in place of a tensor. `frame` counts from 0 over the message's tensor frames."""

    frame: Annotated[int, msgspec.Meta(ge=0, lt=MAX_TENSOR_FRAMES)]
    dtype: DType
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_DIM)], ...], msgspec.Meta(max_length=MAX_RANK)]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensor:
    """dtype, shape and a C-contiguous buffer of exactly `prod(shape) * itemsize` bytes.

    A plain class on purpose: msgspec would encode a dataclass by itself, into the message.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: DType, shape: tuple[int, ...], data: memoryview) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data = data

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> Tensor:
        """Wrap `array` without a copy (a non-contiguous one is copied). Raises Invalid for a dtype that cannot travel."""
        contiguous = np.ascontiguousarray(array)
        try:
            dtype = DType(contiguous.dtype.name)
        except ValueError:
            raise Invalid(f"dtype {contiguous.dtype} cannot travel; use one of {', '.join(d.value for d in DType)}") from None
        return cls(dtype, tuple(array.shape), _byte_view(contiguous))

    def numpy(self) -> npt.NDArray[Any]:
        """The same bytes as an array, without a copy. Raises Invalid for bfloat16, which numpy lacks."""
        if self.dtype is DType.BFLOAT16:
            raise Invalid("numpy has no bfloat16; read .data, or use torch")
        return np.frombuffer(self.data, dtype=self.dtype.value).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def _byte_view(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def resolve(ref: TensorRef, frames: Sequence[Buffer]) -> Tensor:
    """The tensor that `ref` names among `frames`, checked before anything is allocated. Raises WireError."""
    if ref.frame >= len(frames):
        raise WireError(f"tensor frame {ref.frame} is missing: the message has {len(frames)} tensor frames")
    view = memoryview(frames[ref.frame])
    if view.nbytes != ref.nbytes:
        raise WireError(
            f"tensor frame {ref.frame} has {view.nbytes} bytes; {ref.dtype.value}{list(ref.shape)} needs {ref.nbytes}"
        )
    return Tensor(ref.dtype, ref.shape, view.cast("B") if view.nbytes else memoryview(b""))
