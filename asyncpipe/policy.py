"""Where a stage's weights, keys and values, and activations live, and how they move: FlexLLMGen's policy, validated.

Sheng et al. 2023, "FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU". There are three
tiers: the *device* (a GPU's memory; on a CPU-only stage a part of RAM kept apart), the *host* (RAM) and the *disk*. Percentages
are given for device and host; the rest is on disk.
"""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

from asyncpipe.errors import Invalid

MAX_BATCHES = 4096
GROUP_HEADER_BYTES = 4  # a scale and a minimum, in half precision
ROW_HEADER_BYTES = 4  # of a row in 8 bits: a scale in float32
EMBEDDINGS = ("embed_tokens.weight", "embed_positions.weight", "wte.weight", "wpe.weight", "lm_head.weight")
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight")  # small, and a wrong choice of an expert costs most


class Placement(enum.StrEnum):
    """How percentages become places of tensors."""

    EXACT = "exact"  # tensors are split by rows: 20 % is 20 % of the bytes
    FLEXLLMGEN = "flexllmgen"  # whole tensors, by FlexLLMGen's rule of midpoints


class Shares(NamedTuple):
    """Percent on each tier; they add up to 100."""

    device: float
    host: float
    disk: float

    @property
    def all_on_device(self) -> bool:
        return self.device >= 100.0


@dataclass(frozen=True, slots=True)
class Compression:
    """Quantization. In 4 bits, `group_size` consecutive numbers share a scale and a minimum; in 8 bits, all numbers of a row
    share a scale, and groups do not matter.

    Weights are grouped along their input dimension, keys and values along the head. Raises Invalid.
    """

    num_bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.num_bits not in (4, 8):
            raise Invalid(f"compression to {self.num_bits} bits: use 4 or 8")
        if not 2 <= self.group_size <= 4096 or self.group_size % 2:
            raise Invalid(f"compression in groups of {self.group_size}: use an even number from 2 to 4096")

    def packed_bytes(self, size: int) -> int:
        """Of a row of `size` numbers, in 4 bits in whole groups, with what each row or group has beside its codes."""
        if self.num_bits == 8:
            return size + ROW_HEADER_BYTES
        return -(-size // self.group_size) * (self.group_size // 2 + GROUP_HEADER_BYTES)


QUANTIZE_FORMS = {"int8": Compression(num_bits=8), "int4": Compression(num_bits=4)}
"""What `--quantize` makes of weights, to multiply them in that form."""


def is_compressible(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices of layers and projections. Embeddings and the head are looked up or compared row by row, and worth their bits:
    packing them too doubles what 4 bits cost in perplexity."""
    return len(shape) > 1 and name.endswith(".weight") and not name.endswith(EMBEDDINGS + ROUTERS)


@dataclass(frozen=True, slots=True)
class Policy:
    """Fields in FlexLLMGen's order, then ours. Raises Invalid for what cannot be.

    A *block* is `gpu_batch_size` x `num_gpu_batches` sequences: a layer's weights are loaded once for all of it, and computed
    batch by batch. `sep_layer` loads and computes a layer's attention and feed-forward parts separately. `overlap` moves bytes
    while others are computed. `pin_weight` keeps host weights in page-locked memory (CUDA). `cpu_cache_compute` attends to keys
    and values on the host where they are, in decoding. `attn_sparsity` is the share of values that decoding attends to, those
    of the largest weights; 1.0 is exact attention.
    """

    gpu_batch_size: int = 32
    num_gpu_batches: int = 1
    w_gpu_percent: float = 100.0
    w_cpu_percent: float = 0.0
    cache_gpu_percent: float = 100.0
    cache_cpu_percent: float = 0.0
    act_gpu_percent: float = 100.0
    act_cpu_percent: float = 0.0
    overlap: bool = True
    sep_layer: bool = True
    pin_weight: bool = True
    cpu_cache_compute: bool = False
    attn_sparsity: float = 1.0
    compress_weight: bool = False
    comp_weight_config: Compression = Compression()
    compress_cache: bool = False
    comp_cache_config: Compression = Compression()
    placement: Placement = Placement.EXACT

    def __post_init__(self) -> None:
        for name in ("gpu_batch_size", "num_gpu_batches"):
            if not 1 <= getattr(self, name) <= MAX_BATCHES:
                raise Invalid(f"policy: {name} is {getattr(self, name)}; use a number from 1 to {MAX_BATCHES}")
        if self.block_size > MAX_BATCHES:
            raise Invalid(f"policy: gpu_batch_size x num_gpu_batches is {self.block_size}; use at most {MAX_BATCHES}")
        for what in ("w", "cache", "act"):
            self._check_percents(what)
        if not 0.0 < self.attn_sparsity <= 1.0:
            raise Invalid(f"policy: attn_sparsity is {self.attn_sparsity}; use a share above 0, up to 1 (dense)")
        if self.attn_sparsity < 1.0 and self.compress_cache:
            raise Invalid("policy: attn_sparsity below 1 and compress_cache exclude each other; choose one")

    def _check_percents(self, what: str) -> None:
        device, host = getattr(self, f"{what}_gpu_percent"), getattr(self, f"{what}_cpu_percent")
        if not (0.0 <= device <= 100.0 and 0.0 <= host <= 100.0):
            raise Invalid(f"policy: {what}_gpu_percent {device:g} and {what}_cpu_percent {host:g}: use percentages, 0 to 100")
        if device + host > 100.0 + 1e-9:
            raise Invalid(
                f"policy: {what}_gpu_percent {device:g} and {what}_cpu_percent {host:g} add up to more than 100;"
                " the rest of 100 is on disk"
            )

    @property
    def block_size(self) -> int:
        """Sequences of a block."""
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def weights(self) -> Shares:
        return _shares(self.w_gpu_percent, self.w_cpu_percent)

    @property
    def cache(self) -> Shares:
        return _shares(self.cache_gpu_percent, self.cache_cpu_percent)

    @property
    def activations(self) -> Shares:
        return _shares(self.act_gpu_percent, self.act_cpu_percent)

    @property
    def w_disk_percent(self) -> float:
        return self.weights.disk

    @property
    def cache_disk_percent(self) -> float:
        return self.cache.disk

    @property
    def act_disk_percent(self) -> float:
        return self.activations.disk

    @property
    def moves_weights(self) -> bool:
        """Weights are streamed, or unpacked, for every step: a step costs much whether it is small or large."""
        return not self.weights.all_on_device or self.compress_weight

    @property
    def moves_cache(self) -> bool:
        return not self.cache.all_on_device or self.compress_cache or self.attn_sparsity < 1.0

    @property
    def arithmetic(self) -> tuple[object, ...]:
        """What changes the tokens that come out: equal for policies that only move bytes in other ways."""
        return (
            self.attn_sparsity,
            self.comp_weight_config if self.compress_weight else None,
            self.comp_cache_config if self.compress_cache else None,
        )


def _shares(device: float, host: float) -> Shares:
    disk = 100.0 - device - host
    return Shares(device, host, disk if disk > 1e-9 else 0.0)  # 33.3 + 66.7 is not quite 100


POLICY_FIELDS = tuple(field.name for field in fields(Policy))
PERCENT_FIELDS = tuple(name for name in POLICY_FIELDS if name.endswith("_percent"))  # in the order of `--percent`
_CONFIG_FIELDS = ("comp_weight_config", "comp_cache_config")


def policy_flags(policy: Policy) -> list[str]:
    """The command line's flags for it: those that differ from the defaults."""
    default = Policy()
    changed = {name: getattr(policy, name) for name in POLICY_FIELDS if getattr(policy, name) != getattr(default, name)}
    configs = {name: asdict(value) for name, value in changed.items() if name in _CONFIG_FIELDS}
    flags = ["--policy", json.dumps(configs)] if configs else []
    if changed.keys() & set(PERCENT_FIELDS):
        flags += ["--percent", *(_text(getattr(policy, name)) for name in PERCENT_FIELDS)]
    for name, value in changed.items():
        if name not in (*PERCENT_FIELDS, *_CONFIG_FIELDS):
            flags += [f"--{name.replace('_', '-')}", _text(value)]
    return flags


def _text(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return repr(int(value) if value.is_integer() else value)
        case _:
            return str(value)
