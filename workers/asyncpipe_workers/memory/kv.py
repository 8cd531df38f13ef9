"""Keys and values of every sequence of a stage, written in place.

A sequence owns a *slot*, and blocks of `block_tokens` tokens in it; the coordinator counts blocks and never lets more be used
than there are. Shapes: S slots, H key-value heads, C capacity in tokens, K head size, N blocks, T rows of a step, B sequences.

`ArenaKV` is for CPU memory: a slot is a stretch of address space as long as the context, and the operating system gives it
memory page by page as it grows. So a sequence's keys are one strided view: nothing is copied or padded to attend to them.
`PagedKV` is for devices whose memory has no such pages: blocks of one pool, gathered for each use (Kwon et al. 2023, "Efficient
Memory Management for Large Language Model Serving with PagedAttention").
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from asyncpipe.errors import Invalid
from asyncpipe_workers.attention import PLAIN, QKV, AttentionForm, KeysValues, attend_rows, score_bias
from asyncpipe_workers.indices import indices
from asyncpipe_workers.layout import FixedRows, RowGroup, Seen, StepLayout
from asyncpipe_workers.newest import newest_attention
from asyncpipe_workers.step_attention import attend, attend_groups

CALL_BYTES = 512 << 10  # that a core reads while it could call another kernel
PAGE_BYTES = mmap.PAGESIZE
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # address space alone is not counted as memory (mmap(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What a stage keeps for each token, and how much of it there may be."""

    num_layers: int
    num_heads: int  # of keys and values
    head_size: int
    dtype: torch.dtype
    max_context_len: int
    max_sequences: int
    block_tokens: int

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers; whole pages, for a head's tokens are one stretch of memory."""
        head_bytes = self.block_tokens * self.head_size * self.dtype.itemsize
        return 2 * self.num_layers * self.num_heads * -(-head_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def most_blocks(self) -> int:
        """That could ever be used."""
        return self.max_sequences * self.blocks_for(self.max_context_len)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)


class KVCache(Protocol):
    """Where keys and values are. Slots are small integers."""

    num_blocks: int

    def open(self) -> int:
        """A slot for a new sequence. Raises Invalid when all are taken."""
        ...

    def close(self, slot: int) -> None: ...

    def reserve(self, slot: int, length: int) -> None:
        """Make room for `length` tokens in total. Raises Invalid when there are not enough blocks."""
        ...

    def attend(self, layer: int, qkv: QKV, layout: StepLayout, form: AttentionForm = PLAIN) -> torch.Tensor:
        """Causal attention of a step's rows, (T, H, K); their keys and values are kept."""
        ...

    def prefetch(self, layer: int, layout: StepLayout) -> None:
        """`attend` for this layer and layout comes soon: begin to fetch what it will read."""
        ...


class _Slots:
    """Which slots are free, and how many blocks each one has; the last freed is taken first, for its memory is warm."""

    def __init__(self, shape: KVShape, num_blocks: int) -> None:
        self._shape = shape
        self.num_blocks = num_blocks
        self.free = list(range(shape.max_sequences))[::-1]
        self.blocks = [0] * shape.max_sequences
        self.num_used = 0

    def open(self) -> int:
        if not self.free:
            raise Invalid(f"more than {self._shape.max_sequences} sequences at once")
        return self.free.pop()

    def grow(self, slot: int, length: int) -> int:
        """Count the blocks for `length` tokens; returns how many are new."""
        if length > self._shape.max_context_len:
            raise Invalid(f"a sequence of {length} tokens in a context of {self._shape.max_context_len}")
        more = self._shape.blocks_for(length) - self.blocks[slot]
        if more <= 0:
            return 0
        if self.num_used + more > self.num_blocks:
            raise Invalid(f"{self.num_used + more} blocks of keys and values are needed; there are {self.num_blocks}")
        self.blocks[slot] += more
        self.num_used += more
        return more

    def close(self, slot: int) -> None:
        self.num_used -= self.blocks[slot]
        self.blocks[slot] = 0
        self.free.append(slot)


class ArenaKV:
    """In CPU memory. Raises Invalid when the address space cannot be had."""

    def __init__(self, shape: KVShape, *, num_blocks: int) -> None:
        self._slots = _Slots(shape, num_blocks)
        self.num_blocks = num_blocks
        self._warm_blocks = [0] * shape.max_sequences  # that a slot has memory for, in use or not
        self._num_warm = 0
        # A head's stretch of memory is whole pages, so that each block's pages are its own.
        granule = PAGE_BYTES // math.gcd(PAGE_BYTES, shape.head_size * shape.dtype.itemsize)
        granules = -(-shape.max_context_len // granule)
        # Stretches that begin a power of two apart would share few lines of a cache, and evict each other's newest tokens.
        capacity = (granules | 1) * granule
        self.most_padding = CALL_BYTES // (2 * shape.num_heads * shape.head_size * shape.dtype.itemsize)
        self._shape_SHCK = (shape.max_sequences, shape.num_heads, capacity, shape.head_size)
        self._block_tokens = shape.block_tokens
        self._token_bytes = shape.head_size * shape.dtype.itemsize  # of one head
        self._head_bytes = capacity * self._token_bytes
        self._slot_bytes = shape.num_heads * self._head_bytes
        self._maps: list[mmap.mmap] = []
        self._keys = [self._new(shape.dtype) for _ in range(shape.num_layers)]
        self._values = [self._new(shape.dtype) for _ in range(shape.num_layers)]

    def open(self) -> int:
        return self._slots.open()

    def close(self, slot: int) -> None:
        self._slots.close(slot)

    def reserve(self, slot: int, length: int) -> None:
        self._slots.grow(slot, length)
        more = self._slots.blocks[slot] - self._warm_blocks[slot]
        if more > 0:
            self._warm_blocks[slot] += more
            self._num_warm += more
            self._cool()

    def attend(self, layer: int, qkv: QKV, layout: StepLayout, form: AttentionForm = PLAIN) -> torch.Tensor:
        return attend(qkv, layout, self, layer, form)

    def prefetch(self, layer: int, layout: StepLayout) -> None:
        """Everything is here."""

    def write_rows(self, layer: int, group: RowGroup, kv_NGK: KeysValues) -> None:
        """As slices: to index by several tensors at once costs ten times as much, for it goes through memory once a number."""
        start = 0
        for place, run in itertools.groupby(group.newest):
            end = start + sum(1 for _ in run)
            slots = slice(group.first_slot + start, group.first_slot + end)
            self._keys[layer][slots, :, place] = kv_NGK[0][start:end]
            self._values[layer][slots, :, place] = kv_NGK[1][start:end]
            start = end

    def write_span(self, layer: int, slot: int, start: int, kv_THK: KeysValues) -> None:
        end = start + len(kv_THK[0])
        self._keys[layer][slot, :, start:end] = kv_THK[0].transpose(0, 1)
        self._values[layer][slot, :, start:end] = kv_THK[1].transpose(0, 1)

    def read(self, layer: int, slots: slice, places: slice) -> KeysValues:
        return KeysValues(self._keys[layer][slots, :, places], self._values[layer][slots, :, places])

    def attend_rows(self, layer: int, qkv: QKV, layout: StepLayout, form: AttentionForm) -> torch.Tensor:
        cache = KeysValues(self._keys[layer], self._values[layer])
        (num_heads, size), num_groups = qkv.q_THK.shape[1:], cache.keys_GCK.shape[1]
        attention, kept = None, cache.keys_GCK.dtype
        if qkv.q_THK.dtype == torch.float32:
            attention = newest_attention(shared=num_heads // num_groups, size=size, softcap=form.softcap, kept=kept)
        if attention is None:
            return attend_groups(self, layer, qkv, layout, form)
        if form.window not in layout.seen:
            layout.seen[form.window] = Seen.of(layout.rows, form.window)
        return attention(qkv, cache, layout.seen[form.window])

    def _new(self, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = self._shape_SHCK[0] * self._slot_bytes
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        except (OSError, OverflowError) as error:
            raise Invalid(
                f"cannot reserve {num_bytes} bytes of address space for keys and values ({error}):"
                " use a smaller --max-sequences"
            ) from None
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):  # of a kernel that has no huge pages
                memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would hold what nobody has counted
        self._maps.append(memory)
        return torch.frombuffer(memory, dtype=dtype).view(self._shape_SHCK)

    def _cool(self) -> None:
        """Give idle memory back until no more is held than there are blocks.

        That of free slots goes first, the longest unused before others; then what a longer sequence left to a shorter one.
        """
        for slot in itertools.chain(self._slots.free, range(len(self._warm_blocks))):
            if self._num_warm <= self.num_blocks:
                return
            num_idle = self._warm_blocks[slot] - self._slots.blocks[slot]
            if num_idle:
                self._give_back(slot)
                self._num_warm -= num_idle
                self._warm_blocks[slot] -= num_idle

    def _give_back(self, slot: int) -> None:
        """All pages past the slot's blocks: a free slot's are in one piece, others are in one a head."""
        used_pages = -(-self._slots.blocks[slot] * self._block_tokens * self._token_bytes // PAGE_BYTES)
        used_bytes = used_pages * PAGE_BYTES
        piece_bytes = self._head_bytes if used_bytes else self._slot_bytes
        if used_bytes >= piece_bytes:
            return
        for memory in self._maps:
            for start in range(slot * self._slot_bytes, (slot + 1) * self._slot_bytes, piece_bytes):
                memory.madvise(mmap.MADV_DONTNEED, start + used_bytes, piece_bytes - used_bytes)


class PagedKV:
    """In any device's memory, all of it allocated at once."""

    def __init__(self, shape: KVShape, *, num_blocks: int, device: torch.device) -> None:
        self._slots = _Slots(shape, num_blocks)
        self.num_blocks = num_blocks
        self.most_padding = shape.max_context_len  # one gather of much is quicker than many of little
        self._block_tokens = shape.block_tokens
        self._free_blocks = list(range(num_blocks))[::-1]
        self._tables: list[list[int]] = [[] for _ in range(shape.max_sequences)]
        self._device = device
        self._indices_of: dict[Any, torch.Tensor] = {}  # of this step
        self.scratch_block = num_blocks  # nobody's: rows of padding write there
        size_NHTK = (num_blocks + 1, shape.num_heads, shape.block_tokens, shape.head_size)
        # Zeros, for what lies behind a mask is still multiplied, by zero: it must be numbers.
        pools = [torch.zeros(size_NHTK, dtype=shape.dtype, device=device) for _ in range(2 * shape.num_layers)]
        self._keys, self._values = pools[: shape.num_layers], pools[shape.num_layers :]

    def open(self) -> int:
        return self._slots.open()

    def close(self, slot: int) -> None:
        self._slots.close(slot)
        self._free_blocks += self._tables[slot]
        self._tables[slot] = []

    def reserve(self, slot: int, length: int) -> None:
        self._indices_of.clear()
        for _ in range(self._slots.grow(slot, length)):
            self._tables[slot].append(self._free_blocks.pop())

    def table(self, slot: int) -> Sequence[int]:
        """The slot's blocks, in the order of its tokens."""
        return self._tables[slot]

    def attend(self, layer: int, qkv: QKV, layout: StepLayout, form: AttentionForm = PLAIN) -> torch.Tensor:
        if layout.fixed is not None:
            return self._attend_fixed(layer, qkv, layout.fixed, form)
        return attend(qkv, layout, self, layer, form)

    def prefetch(self, layer: int, layout: StepLayout) -> None:
        """Everything is here."""

    def write_rows(self, layer: int, group: RowGroup, kv_NGK: KeysValues) -> None:
        tables = self._tables[group.first_slot : group.first_slot + group.num]
        places = zip(tables, group.newest, strict=True)
        blocks_N = self._indices(tuple(table[place // self._block_tokens] for table, place in places))
        offsets_N = self._indices(tuple(place % self._block_tokens for place in group.newest))
        self._keys[layer][blocks_N, :, offsets_N] = kv_NGK[0]
        self._values[layer][blocks_N, :, offsets_N] = kv_NGK[1]

    def write_span(self, layer: int, slot: int, start: int, kv_THK: KeysValues) -> None:
        positions = range(start, start + len(kv_THK[0]))
        blocks_T = self._indices(tuple(self._tables[slot][position // self._block_tokens] for position in positions))
        offsets_T = self._indices(tuple(position % self._block_tokens for position in positions))
        self._keys[layer][blocks_T, :, offsets_T] = kv_THK[0]
        self._values[layer][blocks_T, :, offsets_T] = kv_THK[1]

    def read(self, layer: int, slots: slice, places: slice) -> KeysValues:
        """A sequence that is shorter than others is padded with any of its blocks."""
        first, last = places.start // self._block_tokens, -(-places.stop // self._block_tokens)
        tables = [self._tables[slot] for slot in range(slots.start, slots.stop)]
        blocks_SN = self._indices(tuple(tuple(table[min(n, len(table) - 1)] for n in range(first, last)) for table in tables))
        within = slice(places.start - first * self._block_tokens, places.stop - first * self._block_tokens)
        return KeysValues(*(self._gathered(pools[layer], blocks_SN, within) for pools in (self._keys, self._values)))

    def attend_rows(self, layer: int, qkv: QKV, layout: StepLayout, form: AttentionForm) -> torch.Tensor:
        return attend_groups(self, layer, qkv, layout, form)

    def _gathered(self, pool_NHTK: torch.Tensor, blocks_SN: torch.Tensor, within: slice) -> torch.Tensor:
        return pool_NHTK[blocks_SN].transpose(1, 2).flatten(2, 3)[:, :, within]

    def _attend_fixed(self, layer: int, qkv: QKV, rows: FixedRows, form: AttentionForm) -> torch.Tensor:
        """Without a look at a number, so that a graph of it can be replayed with others."""
        blocks_B = rows.tables_BN.gather(1, (rows.positions_B // self._block_tokens)[:, None])[:, 0]
        offsets_B = rows.positions_B % self._block_tokens
        self._keys[layer][blocks_B, :, offsets_B] = qkv.k_TGK
        self._values[layer][blocks_B, :, offsets_B] = qkv.v_TGK
        if form.window not in rows.masks:
            places_C = torch.arange(rows.tables_BN.shape[1] * self._block_tokens, device=self._device)
            rows.masks[form.window] = score_bias(rows.positions_B, places_C, form.window)[:, None, None]
        keys, values = (self._gathered(pools[layer], rows.tables_BN, slice(None)) for pools in (self._keys, self._values))
        return attend_rows(qkv.q_THK, keys, values, rows.masks[form.window], form.softcap)

    def _indices(self, values: tuple[Any, ...]) -> torch.Tensor:
        """For all layers they are made once in a step."""
        found = self._indices_of.get(values)
        if found is None:
            found = self._indices_of[values] = indices(values, self._device)
        return found


def make_kv_cache(shape: KVShape, *, num_blocks: int, device: torch.device) -> KVCache:
    """The kind that fits the device."""
    if device.type == "cpu":
        return ArenaKV(shape, num_blocks=num_blocks)
    return PagedKV(shape, num_blocks=num_blocks, device=device)
