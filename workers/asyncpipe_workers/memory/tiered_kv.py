"""Keys and values on several memory tiers.

Each token's keys and values have a home tier; a sequence's tokens on a tier are one stretch of it. Attention does not ask in
which order past tokens come, so it is computed over the stretches: those on the device where they are, the others brought to
a workspace on the device while the batch before is computed; the new tokens' own keys and values are at hand. New ones are
brought home meanwhile too.

Shapes: T rows of a step, C past tokens, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from asyncpipe.errors import Invalid
from asyncpipe.policy import Policy
from asyncpipe.wire.messages import TierBytes
from asyncpipe_workers.attention import PLAIN, QKV, AttentionForm, KeysValues, attend_rows
from asyncpipe_workers.chunks import attend_chunk
from asyncpipe_workers.layout import Span, StepLayout
from asyncpipe_workers.memory.disk import HOST, new_buffer
from asyncpipe_workers.memory.kv import KVShape
from asyncpipe_workers.memory.quantization import make_codec
from asyncpipe_workers.memory.ring import POISON, POISON_BYTE
from asyncpipe_workers.memory.routes import Group, Growth, HomesByTier, Router, Stretch
from asyncpipe_workers.memory.segments import Segment, attend_densely, attend_sparsely, kv_heads
from asyncpipe_workers.memory.shares import Apportionment, Counts
from asyncpipe_workers.memory.token_stores import DiskTokens, MemoryTokens, Part
from asyncpipe_workers.memory.transfers import TRANSFER_TIMEOUT_S, Cargo, TransferLog

KEYS, VALUES = 0, 1
FETCH_TASKS = 4  # for a batch: as many as there are threads
NUM_WORKSPACES = 2  # of the batch that is computed, and of the next


class _Homeward(NamedTuple):
    """New keys or values (n, H, K) of a chunk whose homes are not on the device."""

    part: Part
    slot: int
    old: Counts
    added: Counts
    x_THK: torch.Tensor


@dataclass(slots=True, eq=False)
class Workspace:
    """Numbers on the device: keys, then values, of all tokens that a batch needs from elsewhere."""

    memory: torch.Tensor
    in_use: bool = False


@dataclass(slots=True, eq=False)
class Fetch:
    """What a batch needs for a layer, on its way to a workspace: keys and values, (C, H, K) each."""

    workspace: Workspace
    numbers: tuple[torch.Tensor, torch.Tensor]
    stretches: Mapping[int, Stretch]  # by slot
    tasks: list[Future[None]]


class TieredKV:
    """A `KVCache`. Use it from one thread; other threads only move bytes."""

    def __init__(
        self,
        shape: KVShape,
        policy: Policy,
        *,
        num_blocks: int,
        device: torch.device,
        directory: Path,
        pool: Executor,
        log: TransferLog,
    ) -> None:
        self.num_blocks = num_blocks
        self._shape = shape
        self._policy = policy
        self._device = device
        self._pool = pool
        self._log = log
        self._codec = make_codec(policy.comp_cache_config) if policy.compress_cache else None
        self._split = Apportionment(policy.cache)
        self._free = list(range(shape.max_sequences))[::-1]
        self._lengths = [Counts()] * shape.max_sequences
        self._growth: dict[int, Growth] = {}
        self._router = Router(policy, self._growth)
        most = self._split.most(shape.max_context_len)
        sizes = {"max_sequences": shape.max_sequences, "token_bytes": self.token_bytes}
        self._on_device = MemoryTokens(num_layers=shape.num_layers, capacity=most.device, device=device, **sizes)
        self._on_host = MemoryTokens(num_layers=shape.num_layers, capacity=most.host, device=HOST, **sizes)
        self._on_disk = DiskTokens(directory, capacity=most.disk, **sizes) if most.disk else None
        self._workspaces = [Workspace(torch.empty(0, dtype=shape.dtype, device=device)) for _ in range(NUM_WORKSPACES)]
        self._fetches: dict[tuple[int, int], Fetch] = {}
        self._stores: list[list[Future[None]]] = [[] for _ in range(shape.num_layers)]

    @property
    def token_bytes(self) -> int:
        """As they are stored: one token's keys, or values, in one layer."""
        return self._shape.num_heads * self._head_bytes

    @property
    def tier_bytes(self) -> TierBytes:
        """Of all the tokens that there is room for."""
        num_bytes = self.num_blocks * self._shape.block_tokens * self._shape.num_layers * 2 * self.token_bytes
        return TierBytes.shared_out(num_bytes, self._policy.cache)

    # --- slots ---

    def open(self) -> int:
        if not self._free:
            raise Invalid(f"more than {self._shape.max_sequences} sequences at once")
        return self._free.pop()

    def close(self, slot: int) -> None:
        self._await_stores(range(self._shape.num_layers))
        self._split.remove(self._lengths[slot])
        self._lengths[slot] = Counts()
        self._growth.pop(slot, None)
        for tier in (self._on_device, self._on_host):
            tier.release(slot)
        self._free.append(slot)

    def close_files(self) -> None:
        if self._on_disk is not None:
            self._on_disk.close()

    def reserve(self, slot: int, length: int) -> None:
        """Decides where the new tokens' homes are."""
        if length > self._shape.max_context_len:
            raise Invalid(f"a sequence of {length} tokens in a context of {self._shape.max_context_len}")
        old = self._lengths[slot]
        added = self._split.extend(old, length - sum(old))
        if sum(self._split.total) > self.num_blocks * self._shape.block_tokens:
            raise Invalid(f"{sum(self._split.total)} tokens of keys and values; there is room for fewer")
        self._growth[slot] = Growth(old, added)
        self._lengths[slot] = old.plus(added)

    # --- attention ---

    def prefetch(self, layer: int, layout: StepLayout) -> None:
        key = (layer, id(layout))
        if key not in self._fetches and (fetch := self._fetch(layer, layout)) is not None:
            self._fetches[key] = fetch

    def attend(self, layer: int, qkv: QKV, layout: StepLayout, form: AttentionForm = PLAIN) -> torch.Tensor:
        assert form.is_plain  # noqa: S101 - checked when the stage is loaded: the order of past tokens is not kept
        self.prefetch(layer, layout)
        fetch = self._fetches.pop((layer, id(layout)), None)
        if fetch is not None:
            for task in fetch.tasks:
                self._log.wait(Cargo.CACHE_LOADS, task, f"keys and values of layer {layer}")
        out_THK = torch.empty_like(qkv.q_THK)
        route = self._router.route(layout)
        for group in route.groups:
            assert fetch is not None  # noqa: S101 - a group's tokens are in the workspace
            out_THK[group.first : group.last] = self._attend_group(group, qkv, fetch)
        for index in route.alone:
            out_THK[index] = self._attend_row(layer, index, layout.rows[index].slot, qkv, fetch)
        for span in layout.spans:
            out_THK[span.start : span.end] = self._attend_span(layer, span, qkv, fetch)
        if layout.padding:
            out_THK[len(out_THK) - layout.padding :] = 0
        self._store(layer, qkv, layout)
        if fetch is not None:
            self._leave(fetch.workspace)
        if layer == self._shape.num_layers - 1:
            self._router.forget(layout)
        return out_THK

    def _attend_group(self, group: Group, qkv: QKV, fetch: Fetch) -> torch.Tensor:
        """(n, H, K): one new token each of n sequences of the same length, side by side in the workspace."""
        rows, num = slice(group.first, group.last), group.last - group.first
        size_NCHK = (num, group.length + 1, *qkv.k_TGK.shape[1:])
        stretch = slice(group.start, group.start + num * (group.length + 1))
        keys_NCHK, values_NCHK = (numbers[stretch].view(size_NCHK) for numbers in fetch.numbers)
        keys_NCHK[:, -1], values_NCHK[:, -1] = qkv.k_TGK[rows], qkv.v_TGK[rows]
        return attend_rows(qkv.q_THK[rows], keys_NCHK.transpose(1, 2), values_NCHK.transpose(1, 2))

    def _attend_row(self, layer: int, index: int, slot: int, qkv: QKV, fetch: Fetch | None) -> torch.Tensor:
        """(H, K): one new token over past ones that are in several places, and itself."""
        own = slice(index, index + 1)
        segments = self._segments(layer, slot, fetch, whole=False)
        newest = KeysValues(qkv.k_TGK[own], qkv.v_TGK[own])
        if self._policy.attn_sparsity < 1.0:
            return attend_sparsely(qkv.q_THK[index], segments, newest, sparsity=self._policy.attn_sparsity)
        return attend_densely(qkv.q_THK[index], segments, newest)

    def _attend_span(self, layer: int, span: Span, qkv: QKV, fetch: Fetch | None) -> torch.Tensor:
        """(T, H, K): a chunk of a prompt over what came before it and itself."""
        rows, slot = slice(span.start, span.end), span.member.slot
        segments = self._segments(layer, slot, fetch, whole=True) if span.position else []
        keys = torch.cat([*(segment.keys.to(self._device) for segment in segments), qkv.k_TGK[rows]])
        values = torch.cat([*(segment.whole_values().to(self._device) for segment in segments), qkv.v_TGK[rows]])
        return attend_chunk(qkv.q_THK[rows], KeysValues(keys.transpose(0, 1), values.transpose(0, 1)))

    # --- past tokens ---

    def _segments(self, layer: int, slot: int, fetch: Fetch | None, *, whole: bool) -> list[Segment]:
        """Past tokens, (C, H, K) each, where attention can use them."""
        old, segments = self._growth[slot].old, []
        fetched = self._router.in_workspace(old, whole=whole)
        if old.device > fetched.device:
            segments.append(self._in_place(self._on_device, layer, slot, old.device))
        if old.host > fetched.host:
            segments.append(self._in_place(self._on_host, layer, slot, old.host))
        if fetch is not None and any(fetched):
            keys, values = (numbers[self._stretch_of(fetch, slot)] for numbers in fetch.numbers)
            sparse = self._policy.attn_sparsity < 1.0 and not whole
            segments.append(Segment(keys, None, self._gather(layer, slot, fetched)) if sparse else Segment(keys, values))
        return segments

    def _stretch_of(self, fetch: Fetch, slot: int) -> slice:
        stretch = fetch.stretches[slot]
        return slice(stretch.start, stretch.end)

    def _in_place(self, tokens: MemoryTokens, layer: int, slot: int, count: int) -> Segment:
        keys, values = (self._numbers(tokens.rows(Part(layer, which), slot, 0, count)) for which in (KEYS, VALUES))
        return Segment(keys, values)

    def _gather(self, layer: int, slot: int, fetched: Counts) -> Callable[[torch.Tensor], torch.Tensor]:
        """Of the fetched tokens, single values: (H, n) indices to (H, n, K)."""
        part, num_host = Part(layer, VALUES), fetched.host

        def gather(chosen_HN: torch.Tensor) -> torch.Tensor:
            unique_U, places_HN = torch.unique(chosen_HN.cpu(), return_inverse=True)
            found = torch.empty(len(unique_U), self.token_bytes, dtype=torch.uint8)
            from_host = unique_U < num_host
            if num_host:
                found[from_host] = self._on_host.rows(part, slot, 0, num_host)[unique_U[from_host]]
            if self._on_disk is not None and not bool(from_host.all()):
                found[~from_host] = self._on_disk.gather(part, slot, (unique_U[~from_host] - num_host).tolist())
            values_UHK = self._numbers(found).to(self._device)
            heads_H1 = kv_heads(len(chosen_HN), self._shape.num_heads, self._device)
            return values_UHK[places_HN.to(self._device), heads_H1]

        return gather

    # --- bringing past tokens here ---

    def _fetch(self, layer: int, layout: StepLayout) -> Fetch | None:
        """Begin to; None when nothing has to come."""
        route = self._router.route(layout)
        if not route.num_tokens:
            return None
        workspace, numbers = self._enter(route.num_tokens)
        before = list(self._stores[layer])
        stretches = [stretch for stretch in route.stretches.values() if any(stretch.tokens)]
        share = -(-len(stretches) // FETCH_TASKS) or 1
        tasks = [
            self._pool.submit(self._bring, layer, stretches[first : first + share], numbers, before)
            for first in range(0, len(stretches), share)
        ]
        fetch = Fetch(workspace, numbers, route.stretches, tasks)
        if not self._policy.overlap:
            for task in tasks:
                self._log.wait(Cargo.CACHE_LOADS, task, f"keys and values of layer {layer}")
        return fetch

    @torch.inference_mode()
    def _bring(
        self,
        layer: int,
        stretches: Sequence[Stretch],
        numbers: tuple[torch.Tensor, torch.Tensor],
        before: Sequence[Future[None]],
    ) -> None:
        """Copy, read and unpack past tokens, once those of earlier steps have been brought home."""
        for store in before:
            store.result(timeout=TRANSFER_TIMEOUT_S)
        for stretch in stretches:
            for which in (KEYS,) if stretch.keys_only else (KEYS, VALUES):
                with self._log.moving(Cargo.CACHE_LOADS, sum(stretch.tokens) * self.token_bytes):
                    self._bring_stretch(Part(layer, which), stretch, numbers[which])

    def _bring_stretch(self, part: Part, stretch: Stretch, target: torch.Tensor) -> None:
        slot, (device, host, disk), start = stretch.slot, stretch.tokens, stretch.start
        if device:
            start = self._put(target, start, self._on_device.rows(part, slot, 0, device))
        if host:
            start = self._put(target, start, self._on_host.rows(part, slot, 0, host))
        if disk:
            self._read(part, slot, disk, target[start : start + disk])

    def _read(self, part: Part, slot: int, count: int, target: torch.Tensor) -> None:
        assert self._on_disk is not None  # noqa: S101 - there are tokens on it
        if self._codec is None and self._device.type == "cpu":
            self._on_disk.read(part, slot, 0, target.view(count, -1).view(torch.uint8))
            return
        rows = torch.empty(count, self.token_bytes, dtype=torch.uint8)
        self._on_disk.read(part, slot, 0, rows)
        self._put(target, 0, rows)

    def _put(self, target: torch.Tensor, start: int, rows: torch.Tensor) -> int:
        """Stored rows as numbers into `target` from `start` on; returns where they end."""
        end = start + len(rows)
        if self._codec is None:
            target[start:end] = self._numbers(rows)
        else:
            heads = rows.to(self._device).view(len(rows), self._shape.num_heads, self._head_bytes)
            self._codec.decode(heads, self._shape.head_size, dtype=self._shape.dtype, out=target[start:end])
        return end

    def _enter(self, num_tokens: int) -> tuple[Workspace, tuple[torch.Tensor, torch.Tensor]]:
        workspace = next((w for w in self._workspaces if not w.in_use), None)
        if workspace is None:
            raise Invalid("more batches are fetched ahead than there are workspaces")
        workspace.in_use = True
        half = num_tokens * self._shape.num_heads * self._shape.head_size
        if workspace.memory.numel() < 2 * half:
            workspace.memory = new_buffer(2 * half * self._shape.dtype.itemsize, self._device).view(self._shape.dtype)
        size_CHK = (num_tokens, self._shape.num_heads, self._shape.head_size)
        return workspace, (workspace.memory[:half].view(size_CHK), workspace.memory[half : 2 * half].view(size_CHK))

    def _leave(self, workspace: Workspace) -> None:
        if POISON:
            workspace.memory.view(torch.uint8).fill_(POISON_BYTE)
        workspace.in_use = False

    # --- bringing new tokens home ---

    def _store(self, layer: int, qkv: QKV, layout: StepLayout) -> None:
        homes = self._router.route(layout).homes
        away: list[_Homeward] = []
        for which, x_THK in ((KEYS, qkv.k_TGK), (VALUES, qkv.v_TGK)):
            part = Part(layer, which)
            if homes.device is not None:
                self._on_device.put(part, homes.device.slots_N, homes.device.places_N, self._stored(x_THK[homes.device.rows_N]))
            for span in layout.spans:
                away += self._store_chunk(part, span, x_THK[span.start : span.end])
        self._stores[layer] = [store for store in self._stores[layer] if not store.done() or store.exception()]
        if away or homes.host is not None or homes.disk is not None:
            self._stores[layer].append(self._pool.submit(self._bring_home, layer, homes, (qkv.k_TGK, qkv.v_TGK), away))
        if not self._policy.overlap:
            self._await_stores([layer])

    def _store_chunk(self, part: Part, span: Span, x_THK: torch.Tensor) -> Iterator[_Homeward]:
        """What stays on the device, at once; the rest is given back, to be brought home."""
        old, added = self._growth[span.member.slot]
        if added.device:
            rows = self._on_device.rows(part, span.member.slot, old.device, old.device + added.device)
            rows.copy_(self._stored(x_THK[: added.device]))
        if added.host or added.disk:
            yield _Homeward(part, span.member.slot, old, added, x_THK[added.device :])

    @torch.inference_mode()
    def _bring_home(
        self, layer: int, homes: HomesByTier, keys_values: tuple[torch.Tensor, torch.Tensor], away: Sequence[_Homeward]
    ) -> None:
        for which, x_THK in enumerate(keys_values):
            self._bring_rows_home(Part(layer, which), homes, x_THK)
        for part, slot, old, added, x_THK in away:
            rows = self._stored(x_THK).to(HOST)
            with self._log.moving(Cargo.CACHE_STORES, rows.numel()):
                if added.host:
                    self._on_host.rows(part, slot, old.host, old.host + added.host).copy_(rows[: added.host])
                if added.disk and self._on_disk is not None:
                    self._on_disk.write(part, slot, old.disk, rows[added.host :])

    def _bring_rows_home(self, part: Part, homes: HomesByTier, x_THK: torch.Tensor) -> None:
        if homes.host is not None:
            rows = self._stored(x_THK[homes.host.rows_N]).to(HOST)
            with self._log.moving(Cargo.CACHE_STORES, rows.numel()):
                self._on_host.put(part, homes.host.slots_N, homes.host.places_N, rows)
        if homes.disk is not None and self._on_disk is not None:
            rows = self._stored(x_THK[homes.disk.rows_N]).to(HOST)
            places = zip(homes.disk.slots_N.tolist(), homes.disk.places_N.tolist(), strict=True)
            with self._log.moving(Cargo.CACHE_STORES, rows.numel()):
                for index, (slot, place) in enumerate(places):
                    self._on_disk.write(part, slot, place, rows[index : index + 1])

    def _await_stores(self, layers: Sequence[int]) -> None:
        for layer in layers:
            for store in self._stores[layer]:
                self._log.wait(Cargo.CACHE_STORES, store, f"storing keys and values of layer {layer}")
            self._stores[layer].clear()

    # --- forms ---

    @property
    def _head_bytes(self) -> int:
        size = self._shape.head_size
        return self._codec.packed_size(size) if self._codec else size * self._shape.dtype.itemsize

    def _numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """Plain stored rows (n, B) as (n, H, K)."""
        return rows.view(self._shape.dtype).view(len(rows), self._shape.num_heads, self._shape.head_size)

    def _stored(self, x_THK: torch.Tensor) -> torch.Tensor:
        """(n, H, K) as they are stored, (n, B)."""
        if self._codec is not None:
            return self._codec.encode(x_THK).view(len(x_THK), -1)
        return x_THK.contiguous().view(len(x_THK), -1).view(torch.uint8)
