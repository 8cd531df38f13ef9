"""A tensor in the form in which it is stored: rows of bytes, its numbers or codes of few bits. Vectors are one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asyncpipe_workers.checkpoint import FileRange
from asyncpipe_workers.memory.quantization import Codec


@dataclass(frozen=True, slots=True)
class StoredForm:
    """Of a tensor of `shape`: `codec` None means plain numbers of `dtype`. `place` is where its bytes are, row by row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    codec: Codec | None
    place: FileRange | None

    @property
    def num_rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_len(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return self.codec.packed_size(self.row_len) if self.codec else self.row_len * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    def unpack(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """`rows` (n, row_bytes) uint8 to numbers in `out` (n, row_len)."""
        if self.codec is not None:
            self.codec.decode(rows, self.row_len, dtype=out.dtype, out=out)
        else:
            out.copy_(self.numbers(rows))

    def numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """Plain rows as what they are, (n, row_len), without a copy where they are aligned to their type."""
        if rows.storage_offset() % self.dtype.itemsize:
            rows = rows.clone()
        return rows.view(self.dtype)

    def all_numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """All rows, (num_rows, row_bytes), as the tensor; without a copy where they are plain."""
        if self.codec is None:
            return self.numbers(rows).view(self.shape)
        return self.codec.decode(rows, self.row_len, dtype=torch.float32).view(self.shape)
