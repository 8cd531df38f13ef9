"""Typed messages to frames and back: frame 0 is the MessagePack struct, the rest are its tensors.

`Codec(union)` decodes exactly the messages of that union. Anything else, however mangled, raises WireError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from asyncpipe.errors import Invalid, WireError
from asyncpipe.wire.tensors import MAX_TENSOR_FRAMES, Buffer, Tensor, TensorRef, resolve

T = TypeVar("T")


def encode(message: msgspec.Struct) -> list[Buffer]:
    """`[body, tensor bytes…]`; tensors are referenced, not copied. Raises Invalid for what cannot travel."""
    frames: list[Buffer] = [b""]

    def reference(value: Any) -> TensorRef:
        if not isinstance(value, Tensor):
            raise NotImplementedError(f"a {type(value).__name__} cannot travel in a message")
        if len(frames) > MAX_TENSOR_FRAMES:
            raise NotImplementedError(f"more than {MAX_TENSOR_FRAMES} tensors in one message")
        frames.append(value.data)
        return TensorRef(len(frames) - 2, value.dtype, value.shape)

    try:
        frames[0] = msgspec.msgpack.Encoder(enc_hook=reference).encode(message)
    except (NotImplementedError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"{type(message).__name__} cannot be sent: {error}") from None
    return frames


class Codec(Generic[T]):
    """Decodes the messages of one union."""

    def __init__(self, union: Any) -> None:
        self.union = union
        self._frames: Sequence[Buffer] = ()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union, dec_hook=self._materialize)

    def decode(self, frames: Sequence[Buffer]) -> T:
        """The message in `frames`; its tensors view the frames' memory. Raises WireError."""
        if not frames:
            raise WireError("a message without frames")
        self._frames = frames[1:]
        try:
            return self._decoder.decode(frames[0])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"not a valid message: {error}") from None
        finally:
            self._frames = ()

    def _materialize(self, wanted: type, value: Any) -> Any:
        if wanted is not Tensor:
            raise WireError(f"unexpected type {wanted}")
        return resolve(msgspec.convert(value, TensorRef), self._frames)
