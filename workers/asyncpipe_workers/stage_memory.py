"""From a plan to a stage's layers, weights, cache and activations, each on the tiers that its policy says."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asyncpipe.errors import Invalid
from asyncpipe.free_space import free_disk_bytes
from asyncpipe.policy import QUANTIZE_FORMS, Policy
from asyncpipe.wire.messages import LoadStage, TierBytes, TierReport
from asyncpipe_workers.checkpoint import Checkpoint
from asyncpipe_workers.memory.activations import Activations, DeviceActivations, TieredActivations
from asyncpipe_workers.memory.available import available_bytes
from asyncpipe_workers.memory.disk import DiskFiles
from asyncpipe_workers.memory.kv import KVCache, KVShape, make_kv_cache
from asyncpipe_workers.memory.placement import Sized, place
from asyncpipe_workers.memory.quantization import Codec, make_codec
from asyncpipe_workers.memory.source import CheckpointSource, DummySource, TensorSource
from asyncpipe_workers.memory.stored import Storage, StoredTensor
from asyncpipe_workers.memory.stored_form import StoredForm
from asyncpipe_workers.memory.tiered_kv import TieredKV
from asyncpipe_workers.memory.transfers import TransferLog
from asyncpipe_workers.memory.weights import ResidentWeights, StreamedWeights, WeightStore
from asyncpipe_workers.models.int8 import pack_all
from asyncpipe_workers.models.kernels import FloatLinears
from asyncpipe_workers.models.quantized import QuantizedLinears
from asyncpipe_workers.models.registry import Model, find_model
from asyncpipe_workers.models.units import StageUnits, Unit
from asyncpipe_workers.models.weights import Resident, Wanted
from asyncpipe_workers.newest import newest_attention
from asyncpipe_workers.sweep import sequence_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IO_THREADS = 4
KV_DISK_SHARE = 0.5  # of the free disk, when nothing else says how much


@dataclass(slots=True)
class StageMemory:
    policy: Policy
    device: torch.device
    dtype: torch.dtype
    units: StageUnits
    weights: WeightStore
    cache: KVCache
    activations: Activations
    transfers: TransferLog
    report: TierReport
    num_params: int
    param_bytes: int
    kv_block_bytes: int
    is_static: bool  # of the model: `Model.is_static`
    resources: contextlib.ExitStack

    def close(self) -> None:
        """Stop what moves, and let files go."""
        self.weights.close()
        self.resources.close()


def load_stage_memory(plan: LoadStage, device: torch.device) -> tuple[StageMemory, int]:
    """And the size of hidden states. Raises Invalid for a bad plan or checkpoint, or too little memory."""
    if plan.dtype not in DTYPES:
        raise Invalid(f"dtype {plan.dtype}: use one of {', '.join(DTYPES)}")
    if not 0 <= plan.first_layer < plan.last_layer or not 0 <= plan.stage < plan.num_stages:
        raise Invalid(f"stage {plan.stage} of {plan.num_stages} cannot hold layers {plan.first_layer} to {plan.last_layer}")
    model = find_model(plan.config_json, plan.model_impl)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else page-locked memory costs a context on the first card of this machine, too
    with contextlib.ExitStack() as resources:
        memory = _Loader(plan, device, model, resources).load()
        resources.pop_all()  # they are the memory's from now on
    return memory, model.config.hidden_size


class _Loader:
    def __init__(self, plan: LoadStage, device: torch.device, model: Model, resources: contextlib.ExitStack) -> None:
        self._plan = plan
        self._policy = plan.policy
        self._device = device
        self._dtype = DTYPES[plan.dtype]
        self._model = model
        self._config = model.config
        self._directory = Path(plan.offload_dir or tempfile.gettempdir())
        self._files = DiskFiles(direct=self._policy.moves_weights)  # else what is read may stay in the page cache
        self._pool = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="io")
        self._log = TransferLog()
        self._resources = contextlib.ExitStack()
        resources.callback(self._resources.close)
        self._resources.callback(self._files.close)
        self._resources.callback(self._pool.shutdown, cancel_futures=True)

    def load(self) -> StageMemory:
        if self._policy.moves_weights and not self._model.can_stream:
            raise Invalid(
                "the weights of a model that runs in transformers' code must all be on the device (--percent 100 0 ...)"
            )
        units = self._units(separate=self._policy.sep_layer)
        with self._source() as source:
            if self._policy.moves_weights:
                weights, tier_bytes, num_params = self._streamed(units, source)
            else:
                weights, tier_bytes, num_params = self._resident(units, source)
        cache, shape = self._cache(num_layers=self._plan.last_layer - self._plan.first_layer)
        return StageMemory(
            policy=self._policy,
            device=self._device,
            dtype=self._dtype,
            units=units,
            weights=weights,
            cache=cache,
            activations=self._activations(),
            transfers=self._log,
            report=TierReport(
                weights=tier_bytes,
                cache=_cache_bytes(cache, shape),
                activations=self._activation_bytes(),
                buffers=weights.buffer_bytes,
            ),
            num_params=num_params,
            param_bytes=tier_bytes.total,
            kv_block_bytes=shape.block_bytes,
            is_static=self._model.is_static,
            resources=self._resources,
        )

    def _units(self, *, separate: bool) -> StageUnits:
        """The head of a stage whose weights move is cut up, so that the ring need not be longer for it than for layers."""
        plan = self._plan
        bounds: dict[str, Any] = {"first": plan.first_layer, "last": plan.last_layer, "separate": separate}
        units = self._model.units(self._config, logits_rows=None, **bounds)
        if not self._policy.moves_weights or not units.logits:
            return units
        smallest = min(sum(_numbers(wanted) for wanted in unit.wanted) for unit in units.layers)
        row_len = units.logits[0].wanted[0].shape[-1]
        return self._model.units(self._config, logits_rows=max(smallest // row_len, 1), **bounds)

    @contextlib.contextmanager
    def _source(self) -> Iterator[TensorSource]:
        codec = self._weight_codec()
        if self._plan.dummy_weights:
            yield DummySource(dtype=self._dtype, codec=codec)
            return
        with (
            Checkpoint(Path(self._plan.checkpoint)) as checkpoint,
            contextlib.closing(CheckpointSource(checkpoint, self._files, codec=codec)) as source,
        ):
            yield source

    def _weight_codec(self) -> Codec | None:
        """For weights that are packed as they are read."""
        return make_codec(self._policy.comp_weight_config) if self._policy.compress_weight else None

    def _linear_maker(self) -> FloatLinears | QuantizedLinears:
        if not self._plan.quantize:
            return FloatLinears(self._dtype)
        if self._plan.quantize not in QUANTIZE_FORMS:
            raise Invalid(f"quantize {self._plan.quantize}: use one of {', '.join(QUANTIZE_FORMS)}")
        return QuantizedLinears(make_codec(QUANTIZE_FORMS[self._plan.quantize]), self._device, self._dtype)

    # --- weights ---

    def _resident(self, units: StageUnits, source: TensorSource) -> tuple[WeightStore, TierBytes, int]:
        make_linear = self._linear_maker()
        weights = Resident(source, dtype=self._dtype, device=self._device, make_linear=make_linear)
        sequence = sequence_of(units)
        codec = make_linear.codec if isinstance(make_linear, QuantizedLinears) else None
        source.expect(form for group in self._groups(sequence, source, codec) for form in group)
        store = ResidentWeights(sequence, weights)
        if isinstance(make_linear, QuantizedLinears):
            self._pack_later(make_linear)
        return store, TierBytes(device=weights.num_bytes), weights.num_params

    def _pack_later(self, linears: QuantizedLinears) -> None:
        stop = threading.Event()
        thread = threading.Thread(target=pack_all, args=(linears.to_pack, stop), name="pack")
        thread.start()
        self._resources.callback(thread.join)
        self._resources.callback(stop.set)

    def _streamed(self, units: StageUnits, source: TensorSource) -> tuple[WeightStore, TierBytes, int]:
        groups = self._groups(sequence_of(self._units(separate=True)), source)
        forms = [form for group in groups for form in group]
        sized = [[Sized(form.name, form.num_rows, form.row_bytes) for form in group] for group in groups]
        storage = Storage(
            source, self._files, device=self._device, offload_dir=self._directory, pin_host=self._policy.pin_weight
        )
        self._resources.callback(storage.close)
        stored = storage.store(forms, place(sized, self._policy.weights, self._policy.placement))
        weights = StreamedWeights(
            sequence_of(units),
            stored,
            files=self._files,
            pool=self._pool,
            log=self._log,
            dtype=self._dtype,
            device=self._device,
            overlap=self._policy.overlap,
        )
        num_params = sum(form.num_rows * form.row_len for form in forms)
        return weights, _total(stored.values()), num_params

    def _groups(self, units: Sequence[Unit[Any]], source: TensorSource, codec: Codec | None = None) -> list[list[StoredForm]]:
        """Of each unit; every tensor once, in the order of its first use. `codec` is for what is multiplied."""
        seen: set[StoredForm] = set()
        groups = []
        for unit in units:
            forms = [source.form(wanted.name, wanted.shape, None if wanted.is_lookup else codec) for wanted in unit.wanted]
            groups.append([form for form in dict.fromkeys(forms) if form not in seen])
            seen.update(forms)
        return groups

    # --- keys and values, activations ---

    def _cache(self, *, num_layers: int) -> tuple[KVCache, KVShape]:
        plan = self._plan
        shape = KVShape(
            num_layers=num_layers,
            num_heads=self._config.num_kv_heads,
            head_size=self._config.head_size,
            dtype=self._kv_dtype(),
            max_context_len=plan.max_context_len,
            max_sequences=plan.max_sequences,
            block_tokens=plan.kv_block_tokens,
        )
        num_blocks = self._num_blocks(shape)
        self._check_disk(int(num_blocks * shape.block_bytes * self._policy.cache.disk / 100))
        if not self._policy.moves_cache:
            return make_kv_cache(shape, num_blocks=num_blocks, device=self._device), shape
        if not self._config.has_plain_attention:
            raise Invalid(
                "keys and values of this model cannot be shared out among tiers, compressed or sparse yet: its attention has"
                " a window, or caps its scores; leave them all on the device (--percent W W 100 0 A A)"
            )
        cache = TieredKV(
            shape,
            self._policy,
            num_blocks=num_blocks,
            device=self._device,
            directory=self._directory,
            pool=self._pool,
            log=self._log,
        )
        self._resources.callback(cache.close_files)
        return cache, shape

    def _kv_dtype(self) -> torch.dtype:
        """float16 is for CPUs, where kernels read it as float32. Quantized weights cost more than it does, so that it is the
        default with them."""
        is_possible = self._device.type == "cpu" and self._dtype == torch.float32 and not self._policy.moves_cache
        if self._plan.kv_dtype == "auto":
            is_best = is_possible and bool(self._plan.quantize) and self._reads_halves()
            return torch.float16 if is_best else self._dtype
        if self._plan.kv_dtype not in DTYPES:
            raise Invalid(f"kv_dtype {self._plan.kv_dtype}: use one of auto, {', '.join(DTYPES)}")
        wanted = DTYPES[self._plan.kv_dtype]
        if wanted != self._dtype and not (wanted == torch.float16 and is_possible):
            raise Invalid(
                f"--kv-dtype {self._plan.kv_dtype}: keys and values are in {self._plan.dtype}, as --dtype says, or in float16"
                " on a CPU that computes in float32 and has all of them"
            )
        return wanted

    def _reads_halves(self) -> bool:
        """Whether there are quick kernels for it."""
        config = self._config
        shared = config.num_heads // config.num_kv_heads
        return newest_attention(shared=shared, size=config.head_size, softcap=None, kept=torch.float16) is not None

    def _num_blocks(self, shape: KVShape) -> int:
        """As many as the plan's memory takes, on all tiers. Raises Invalid when not even one sequence of a block fits."""
        plan = self._plan
        num_bytes = plan.kv_bytes if plan.kv_bytes is not None else self._free_bytes()
        if num_bytes < shape.block_bytes:
            raise Invalid(
                f"{num_bytes} bytes of KV memory on stage {plan.stage}; one block of {shape.block_tokens} tokens needs"
                f" {shape.block_bytes}: use a larger --kv-memory"
            )
        return min(num_bytes // shape.block_bytes, shape.most_blocks)

    def _check_disk(self, num_bytes: int) -> None:
        free_bytes = free_disk_bytes(self._directory)
        if num_bytes > free_bytes:
            raise Invalid(
                f"--offload-dir {self._directory}: keys and values need {num_bytes} bytes there, and {free_bytes} are free;"
                " use a smaller --kv-memory, or another folder"
            )

    def _free_bytes(self) -> int:
        """For keys and values: what the tier that has the least room for its share allows."""
        device, host, disk = (share / 100 for share in self._policy.cache)
        limits = []
        if self._device.type == "cpu":
            device, host = 0.0, device + host  # one memory
        if device:
            limits.append(available_bytes(self._device) * self._plan.kv_share / device)
        if host:
            limits.append(available_bytes(torch.device("cpu")) * self._plan.kv_share / host)
        if disk:
            limits.append(free_disk_bytes(self._directory) * KV_DISK_SHARE / self._plan.num_stages / disk)
        return int(min(limits))

    def _activations(self) -> Activations:
        if self._policy.activations.all_on_device:
            return DeviceActivations()
        activations = TieredActivations(
            self._policy,
            dtype=self._dtype,
            device=self._device,
            directory=self._directory,
            pool=self._pool,
            log=self._log,
        )
        self._resources.callback(activations.close)
        return activations

    def _activation_bytes(self) -> TierBytes:
        """Of a block of one token a sequence."""
        num_bytes = self._policy.block_size * self._config.hidden_size * self._dtype.itemsize
        return TierBytes.shared_out(num_bytes, self._policy.activations)


def _cache_bytes(cache: KVCache, shape: KVShape) -> TierBytes:
    if isinstance(cache, TieredKV):
        return cache.tier_bytes
    return TierBytes(device=cache.num_blocks * shape.block_bytes)


def _numbers(wanted: Wanted) -> int:
    row_len = wanted.shape[-1] if len(wanted.shape) > 1 else 1
    return (wanted.last - wanted.first) * row_len


def _total(stored: Iterable[StoredTensor]) -> TierBytes:
    each = [tensor.tier_bytes for tensor in stored]
    return TierBytes(*(sum(bytes_) for bytes_ in zip(*((b.device, b.host, b.disk) for b in each), strict=True)))
