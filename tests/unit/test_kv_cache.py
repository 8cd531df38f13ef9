"""Keys and values: one suite for both kinds of cache, and what the operating system says of the memory of `ArenaKV`.

Shapes: H key-value heads, K head size, C and T tokens, B sequences.
"""

from __future__ import annotations

import itertools
import mmap
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from asyncpipe.errors import Invalid
from asyncpipe_workers.layout import Row
from asyncpipe_workers.memory.kv import PAGE_BYTES, ArenaKV, KeysValues, KVCache, KVShape, PagedKV, make_kv_cache
from asyncpipe_workers.step_attention import group_rows

pytestmark = pytest.mark.usefixtures("one_thread")

MakeCache = Callable[[KVShape, int], KVCache]
PAGEMAP = Path("/proc/self/pagemap")
needs_pagemap = pytest.mark.skipif(not PAGEMAP.exists(), reason="the operating system does not tell which pages it gave")


def read_one(cache: Any, layer: int, slot: int, length: int) -> KeysValues:
    """The first `length` tokens of one sequence."""
    keys, values = cache.read(layer, slice(slot, slot + 1), slice(0, length))
    return KeysValues(keys[0], values[0])


def arena(shape: KVShape, num_blocks: int) -> ArenaKV:
    return ArenaKV(shape, num_blocks=num_blocks)


def paged(shape: KVShape, num_blocks: int) -> PagedKV:
    return PagedKV(shape, num_blocks=num_blocks, device=torch.device("cpu"))


both = pytest.mark.parametrize("make_cache", [arena, paged])


def new_shape(**changes: Any) -> KVShape:
    fields: dict[str, Any] = {
        "num_layers": 2,
        "num_heads": 2,
        "head_size": 64,
        "dtype": torch.float32,
        "max_context_len": 160,
        "max_sequences": 4,
        "block_tokens": 16,
    }
    return KVShape(**(fields | changes))


def random_kv(shape: KVShape, count: int, generator: torch.Generator) -> KeysValues:
    """Of `count` tokens, each (T, H, K)."""
    size = (count, shape.num_heads, shape.head_size)
    return KeysValues(*(torch.randn(size, generator=generator).to(shape.dtype) for _ in range(2)))


class Model:
    """What a cache should hold, in plain tensors; writes go to both."""

    def __init__(self, shape: KVShape, cache: KVCache, *, seed: int = 0) -> None:
        self.shape = shape
        self.cache = cache
        self.lengths: dict[int, int] = {}  # what is written, of open slots
        self.reserved: dict[int, int] = {}  # and what there is room for
        self._kept: dict[tuple[int, int], KeysValues] = {}  # by layer and slot; each (C, H, K)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def num_used(self) -> int:
        return sum(map(self.shape.blocks_for, self.reserved.values()))

    @property
    def num_free(self) -> int:
        return self.cache.num_blocks - self.num_used

    def open(self, length: int = 0) -> int:
        slot = self.cache.open()
        assert slot not in self.lengths
        self.lengths[slot] = self.reserved[slot] = 0
        size = (self.shape.max_context_len, self.shape.num_heads, self.shape.head_size)
        for layer in range(self.shape.num_layers):
            self._kept[layer, slot] = KeysValues(*(torch.zeros(size, dtype=self.shape.dtype) for _ in range(2)))
        if length:
            self.reserve(slot, length)
            for layer in range(self.shape.num_layers):
                self.write_span(layer, slot, 0, length)
        return slot

    def close(self, slot: int) -> None:
        self.cache.close(slot)
        del self.lengths[slot], self.reserved[slot]

    def reserve(self, slot: int, length: int) -> None:
        self.cache.reserve(slot, length)
        self.reserved[slot] = max(self.reserved[slot], length)

    def write_span(self, layer: int, slot: int, start: int, end: int) -> None:
        kv_THK = random_kv(self.shape, end - start, self._generator)
        self.cache.write_span(layer, slot, start, kv_THK)
        for kept_CHK, part_THK in zip(self._kept[layer, slot], kv_THK, strict=True):
            kept_CHK[start:end] = part_THK
        self.lengths[slot] = max(self.lengths[slot], end)

    def write_rows(self, layer: int, positions: dict[int, int]) -> None:
        """`positions` by slot."""
        kv_BHK = random_kv(self.shape, len(positions), self._generator)
        rows = [Row(slot, position + 1) for slot, position in positions.items()]
        for group in group_rows(rows, None, self.shape.max_context_len, torch.device("cpu")):
            self.cache.write_rows(layer, group, KeysValues(*(part_BHK[group.rows] for part_BHK in kv_BHK)))
        for row, (slot, position) in enumerate(positions.items()):
            for kept_CHK, part_BHK in zip(self._kept[layer, slot], kv_BHK, strict=True):
                kept_CHK[position] = part_BHK[row]
            self.lengths[slot] = max(self.lengths[slot], position + 1)

    def check(self) -> None:
        """Every token that was written is read, exactly."""
        for slot, length in self.lengths.items():
            for layer in range(self.shape.num_layers):
                for read_HCK, kept_CHK in zip(read_one(self.cache, layer, slot, length), self._kept[layer, slot], strict=True):
                    assert read_HCK.dtype == self.shape.dtype
                    assert torch.equal(read_HCK, kept_CHK[:length].transpose(0, 1))


def new_model(make_cache: MakeCache, *, num_blocks: int = 40, seed: int = 0, **changes: Any) -> Model:
    shape = new_shape(**changes)
    return Model(shape, make_cache(shape, num_blocks), seed=seed)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_size": 42},
        {"head_size": 42, "num_heads": 1, "block_tokens": 5},
        {"head_size": 1, "num_heads": 3, "num_layers": 1, "max_context_len": 37},
        {"head_size": 80, "block_tokens": 1, "max_context_len": 10},
        {"block_tokens": 1000, "max_sequences": 7},
    ],
    ids=str,
)
def test_what_is_written_in_any_order_is_read_back_exactly(
    make_cache: MakeCache, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    generator = random.Random(str(changes))
    shape = new_shape(dtype=dtype, **changes)
    model = Model(shape, make_cache(shape, shape.most_blocks))
    lengths = [shape.max_context_len, 1, *(generator.randint(1, shape.max_context_len) for _ in range(2, shape.max_sequences))]
    writes: list[tuple[int, int, int, int]] = []
    for length in lengths:
        slot = model.open()
        model.reserve(slot, length)
        cuts = sorted({0, length, *(generator.randrange(length) for _ in range(4))})
        for layer in range(shape.num_layers):
            writes += [(layer, slot, start, end) for start, end in itertools.pairwise(cuts)]
    generator.shuffle(writes)
    for write in writes:
        model.write_span(*write)
    model.check()
    for layer in generator.sample(range(shape.num_layers), shape.num_layers):
        for _ in range(5):
            slots = generator.sample(sorted(model.lengths), generator.randint(1, len(lengths)))
            model.write_rows(layer, {slot: generator.randrange(model.lengths[slot]) for slot in slots})
    model.check()


@both
def test_a_prefix_can_be_read_and_nothing_at_all(make_cache: MakeCache) -> None:
    model = new_model(make_cache)
    slot = model.open(50)
    whole, part, nothing = (read_one(model.cache, 1, slot, length) for length in (50, 17, 0))
    assert torch.equal(part.keys_GCK, whole.keys_GCK[:, :17])
    assert torch.equal(part.values_GCK, whole.values_GCK[:, :17])
    assert nothing.keys_GCK.shape == nothing.values_GCK.shape == (2, 0, 64)
    model.write_span(1, slot, 50, 50)
    model.check()


@both
def test_a_slot_that_is_used_again_shows_nothing_old(make_cache: MakeCache) -> None:
    model = new_model(make_cache, max_sequences=2, num_blocks=12)
    stays = model.open(20)
    seen = set()
    for length in (160, 3, 100, 1, 17, 160):
        slot = model.open(length)
        seen.add(slot)
        model.check()
        model.close(slot)
    assert seen == {1 - stays}
    model.check()


def refused(model: Model, action: Callable[[], object]) -> None:
    with pytest.raises(Invalid):
        action()
    model.check()


@both
def test_what_is_refused_changes_nothing(make_cache: MakeCache) -> None:
    model = new_model(make_cache, max_sequences=3, num_blocks=12)
    _, second = model.open(100), model.open(33)  # 7 and 3 blocks: 2 are left
    refused(model, lambda: model.cache.reserve(second, 5 * 16 + 1))
    third = model.open()
    refused(model, model.cache.open)
    refused(model, lambda: model.cache.reserve(third, 33))
    model.reserve(third, 32)
    refused(model, lambda: model.cache.reserve(second, 49))
    model.reserve(second, 48)
    model.close(third)
    model.reserve(second, 80)
    assert model.num_free == 0


@both
@pytest.mark.parametrize("max_context_len", [159, 160, 161])
def test_a_sequence_longer_than_the_context_is_refused(make_cache: MakeCache, max_context_len: int) -> None:
    model = new_model(make_cache, max_context_len=max_context_len)
    slot = model.open(max_context_len)
    refused(model, lambda: model.cache.reserve(slot, max_context_len + 1))


@both
def test_blocks_are_counted_exactly(make_cache: MakeCache) -> None:
    model = new_model(make_cache, num_blocks=10, max_context_len=200)
    assert model.cache.num_blocks == 10
    slot, other = model.open(), model.open()
    for length in (1, 16, 15, 17, 3, 32, 48, 49):  # a smaller length frees nothing
        model.reserve(slot, length)
        spare = model.cache.open()
        num_free = 10 - model.shape.blocks_for(model.reserved[slot])
        refused(model, lambda slot=spare, num=num_free: model.cache.reserve(slot, 16 * num + 1))  # type: ignore[misc]
        model.cache.reserve(spare, 16 * num_free)
        refused(model, lambda: model.cache.reserve(other, 1))
        model.cache.close(spare)
    model.close(slot)
    model.reserve(other, 160)


class CacheMachine(RuleBasedStateMachine):
    """Any sequence of calls, against the model."""

    make_cache: MakeCache
    model: Model

    @initialize(num_blocks=st.integers(1, 24), max_sequences=st.integers(1, 4), head_size=st.sampled_from([42, 64]))
    def begin(self, num_blocks: int, max_sequences: int, head_size: int) -> None:
        shape = new_shape(max_sequences=max_sequences, head_size=head_size)
        self.model = Model(shape, type(self).make_cache(shape, num_blocks))

    @property
    def is_full(self) -> bool:
        return len(self.model.lengths) == self.model.shape.max_sequences

    @precondition(lambda self: not self.is_full)
    @rule(length=st.integers(0, 160))
    def open(self, length: int) -> None:
        self.model.open(min(length, 16 * self.model.num_free))

    @precondition(lambda self: self.is_full)
    @rule()
    def open_too_many(self) -> None:
        refused(self.model, self.model.cache.open)

    @precondition(lambda self: self.model.lengths)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.model.close(self._any_slot(data))

    @precondition(lambda self: self.model.lengths)
    @rule(data=st.data(), count=st.integers(0, 200))
    def extend(self, data: st.DataObject, count: int) -> None:
        model, slot = self.model, self._any_slot(data)
        start = model.lengths[slot]
        end, most = start + count, 16 * (model.shape.blocks_for(start) + model.num_free)
        if end > min(most, 160):
            refused(model, lambda: model.cache.reserve(slot, end))
            return
        model.reserve(slot, end)
        for layer in data.draw(st.permutations(range(model.shape.num_layers))):
            model.write_span(layer, slot, start, end)

    @rule()
    def step(self) -> None:
        """Every sequence that can go on gets a token."""
        model, positions = self.model, {}
        for slot, length in model.lengths.items():
            if length < 160 and (length % 16 or model.num_free):
                model.reserve(slot, length + 1)
                positions[slot] = length
        for layer in range(model.shape.num_layers) if positions else ():
            model.write_rows(layer, positions)

    @invariant()
    def holds_what_was_written(self) -> None:
        self.model.check()

    @invariant()
    def holds_no_more_memory_than_its_blocks(self) -> None:
        if isinstance(self.model.cache, ArenaKV) and PAGEMAP.exists():
            assert resident_bytes(self.model) <= self.model.cache.num_blocks * self.model.shape.block_bytes

    def _any_slot(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model.lengths)))


@both
def test_any_sequence_of_calls_is_like_the_model(make_cache: MakeCache) -> None:
    machine = type("Machine", (CacheMachine,), {"make_cache": staticmethod(make_cache)})
    run_state_machine_as_test(
        machine,
        settings=settings(deadline=None, derandomize=True, max_examples=50, stateful_step_count=25),
    )


def resident_bytes(model: Model) -> int:
    """Memory that the operating system has given for keys and values (Linux: pagemap.rst, bit 63 of a page's entry)."""
    parts = [part for layer in range(model.shape.num_layers) for part in read_one(model.cache, layer, 0, 1)]
    num_pages = 0
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        for storage in (part.untyped_storage() for part in parts):
            pagemap.seek(storage.data_ptr() // PAGE_BYTES * 8)
            entries = pagemap.read(storage.nbytes() // PAGE_BYTES * 8)
            num_pages += sum(byte >> 7 for byte in entries[7::8])
    return num_pages * PAGE_BYTES


@needs_pagemap
@pytest.mark.parametrize(
    ("changes", "is_exact"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16, "block_tokens": 32}, True),
        ({"dtype": torch.bfloat16}, False),
        ({"head_size": 42}, False),
        ({"head_size": 42, "block_tokens": 100}, False),
        ({"head_size": 100, "block_tokens": 7, "num_heads": 3}, False),
        ({"head_size": 1, "max_context_len": 3000, "block_tokens": 1}, False),
    ],
    ids=str,
)
def test_a_block_takes_no_more_memory_than_its_bytes(changes: dict[str, Any], is_exact: bool) -> None:
    shape = new_shape(**changes)
    model = Model(shape, arena(shape, shape.most_blocks))
    assert resident_bytes(model) == 0
    for length in (1, shape.max_context_len // 2, shape.max_context_len, 33):
        model.open(length)
        assert resident_bytes(model) <= model.num_used * shape.block_bytes
        assert not is_exact or resident_bytes(model) == model.num_used * shape.block_bytes


@needs_pagemap
def test_memory_of_closed_sequences_is_kept_until_others_need_it() -> None:
    model = new_model(arena, num_blocks=12)
    for length, num_held in ((64, 4), (64, 4), (160, 10)):
        slot = model.open(length)
        assert resident_bytes(model) == num_held * model.shape.block_bytes
        model.close(slot)
    first, _, third = model.open(160), model.open(16), model.open(16)
    assert resident_bytes(model) == 12 * model.shape.block_bytes
    model.close(first)
    model.reserve(third, 17)
    assert resident_bytes(model) == 2 * model.shape.block_bytes
    model.check()


@needs_pagemap
def test_the_longest_unused_memory_is_given_back_first() -> None:
    model = new_model(arena, num_blocks=12)
    first, second, third = model.open(80), model.open(48), model.open(16)
    model.close(first)
    model.close(second)
    model.reserve(third, 80)
    assert resident_bytes(model) == (3 + 1) * model.shape.block_bytes
    model.check()


@needs_pagemap
def test_memory_of_free_slots_is_given_back_before_that_of_slots_in_use() -> None:
    model = new_model(arena, num_blocks=12)
    model.close(model.open(112))
    _, free, grows = model.open(32), model.open(48), model.open(16)
    model.close(free)
    model.reserve(grows, 48)
    assert resident_bytes(model) == (7 + 1) * model.shape.block_bytes
    model.check()


@needs_pagemap
@pytest.mark.parametrize("head_size", [42, 64])
def test_what_a_long_sequence_leaves_to_a_short_one_goes_to_others(head_size: int) -> None:
    model = new_model(arena, num_blocks=12, max_sequences=2, head_size=head_size)
    model.close(model.open(160))
    short = model.open(30)
    model.open(160)
    assert model.num_used == 12
    assert resident_bytes(model) <= 12 * model.shape.block_bytes
    model.check()
    model.close(1 - short)
    model.reserve(short, 150)
    for layer in range(model.shape.num_layers):
        model.write_span(layer, short, 30, 150)
    assert resident_bytes(model) <= 12 * model.shape.block_bytes
    model.check()


HUGE = """
import random, torch
from asyncpipe_workers.step_attention import group_rows
from asyncpipe_workers.layout import Row
from asyncpipe_workers.memory.kv import ArenaKV, KeysValues, KVShape

def resident_bytes():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))

def write(cache, slot, length):
    cache.reserve(slot, length)
    kv_THK = ones_THK[:length]
    for layer in range(shape.num_layers):
        cache.write_span(layer, slot, 0, KeysValues(kv_THK, kv_THK))
        cache.read(layer, slice(slot, slot + 1), slice(0, length)).keys_GCK.sum()

def shape_of(max_context_len, max_sequences):
    return KVShape(num_layers=4, num_heads=8, head_size=64, dtype=torch.float32, max_context_len=max_context_len,
                   max_sequences=max_sequences, block_tokens=16)

torch.set_num_threads(1)
ones_THK = torch.ones(1600, 8, 64)
shape = shape_of(1600, 1)
write(ArenaKV(shape, num_blocks=100), 0, 1600)  # whatever torch allocates once
before = resident_bytes()
shape = shape_of(1 << 17, 256)
cache = ArenaKV(shape, num_blocks=256)
print(cache.read(0, slice(0, 1), slice(0, 1)).keys_GCK.untyped_storage().nbytes() * 8, shape.block_bytes)
print(resident_bytes() - before)
slot = cache.open()
write(cache, slot, 1600)
print(resident_bytes() - before)
generator, lengths, most = random.Random(0), {slot: 1600}, 0
for _ in range(50):
    blocks = generator.randint(1, 100)
    while sum(lengths.values()) + blocks * 16 > 256 * 16 or generator.random() < 0.2 and lengths:
        slot = generator.choice(sorted(lengths))
        cache.close(slot)
        del lengths[slot]
    slot = cache.open()
    lengths[slot] = blocks * 16
    write(cache, slot, blocks * 16)
    most = max(most, resident_bytes() - before)
print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the operating system does not tell")
def test_hundreds_of_gigabytes_of_address_space_cost_what_is_written_to_them() -> None:
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    address_space, block_bytes, at_first, with_100_blocks, most = map(int, done.stdout.split())
    slack = 2 << 20
    assert address_space > 500e9
    assert at_first < slack
    assert 100 * block_bytes - slack < with_100_blocks < 100 * block_bytes + slack
    assert 200 * block_bytes < most < 256 * block_bytes + slack


def test_an_arena_is_read_where_it_is() -> None:
    model = new_model(arena)
    slot = model.open(20)
    keys_GCK, values_GCK = read_one(model.cache, 0, slot, 20)
    model.write_span(0, slot, 0, 20)
    assert torch.equal(keys_GCK, read_one(model.cache, 0, slot, 20).keys_GCK)
    assert torch.equal(values_GCK, read_one(model.cache, 0, slot, 20).values_GCK)
    assert keys_GCK.stride(1) == 64


@pytest.mark.parametrize("bits", [20, 50])  # more than there is, and more than a number can say
def test_too_large_an_address_space_is_a_users_mistake(bits: int) -> None:
    shape = new_shape(max_context_len=1 << bits, max_sequences=1 << 20)
    with pytest.raises(Invalid, match="--max-sequences"):
        ArenaKV(shape, num_blocks=1)


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_NOHUGEPAGE", 9999, raising=False)  # which it answers as it answers unknown advice
    model = new_model(arena)
    model.open(20)
    model.check()


def test_sizes_are_in_whole_blocks_and_pages() -> None:
    shape = new_shape(head_size=42, dtype=torch.bfloat16, max_context_len=33)
    assert [shape.blocks_for(length) for length in (0, 1, 16, 17, 33)] == [0, 1, 1, 2, 3]
    assert shape.most_blocks == 4 * 3
    assert shape.block_bytes == 2 * 2 * 2 * PAGE_BYTES
    large = new_shape(head_size=128, block_tokens=256)
    assert large.block_bytes == 2 * 2 * 2 * 256 * 128 * 4


def test_the_kind_of_cache_fits_the_device() -> None:
    assert isinstance(make_kv_cache(new_shape(), num_blocks=3, device=torch.device("cpu")), ArenaKV)
    assert isinstance(make_kv_cache(new_shape(), num_blocks=3, device=torch.device("meta")), PagedKV)
