"""Keys and values of the sequences of one micro-batch, written in place and read without a copy.

Shapes: S slots, H heads, C capacity in tokens, K head size. A sequence owns one slot; the slots in use are always 0..n-1,
so that all sequences can be attended to in one call over a view of the cache.
"""

from __future__ import annotations

import torch

MIN_CAPACITY = 64
GROWTH = 2


class KVCache:
    """One pair of (S, H, C, K) tensors a layer. Grows by doubling, in slots and in tokens, up to `max_context_len`."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_size: int,
        max_context_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape_HK = (num_heads, head_size)
        self._max_context_len = max_context_len
        self._dtype = dtype
        self.device = device
        self.num_slots = self.capacity = 0
        self.keys_SHCK = [self._new(0, 0) for _ in range(num_layers)]
        self.values_SHCK = [self._new(0, 0) for _ in range(num_layers)]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys_SHCK, *self.values_SHCK))

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for slots 0..num_slots-1 of `length` tokens each; what is stored stays."""
        if num_slots <= self.num_slots and length <= self.capacity:
            return
        if num_slots > self.num_slots:
            num_slots = max(num_slots, self.num_slots * GROWTH)
        if length > self.capacity:
            length = min(max(length, self.capacity * GROWTH, MIN_CAPACITY), self._max_context_len)
        num_slots, length = max(num_slots, self.num_slots), max(length, self.capacity)
        self.keys_SHCK = [self._grown(old, num_slots, length) for old in self.keys_SHCK]
        self.values_SHCK = [self._grown(old, num_slots, length) for old in self.values_SHCK]
        self.num_slots, self.capacity = num_slots, length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot over another."""
        for tensor_SHCK in (*self.keys_SHCK, *self.values_SHCK):
            tensor_SHCK[target, :, :length] = tensor_SHCK[source, :, :length]

    def _new(self, num_slots: int, capacity: int) -> torch.Tensor:
        num_heads, head_size = self._shape_HK
        return torch.zeros((num_slots, num_heads, capacity, head_size), dtype=self._dtype, device=self.device)

    def _grown(self, old_SHCK: torch.Tensor, num_slots: int, capacity: int) -> torch.Tensor:
        new_SHCK = self._new(num_slots, capacity)
        new_SHCK[: self.num_slots, :, : self.capacity] = old_SHCK
        return new_SHCK
