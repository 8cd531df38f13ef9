"""FlexLLMGen's published runs, by name: `bench --preset opt-30b` runs with the same model shape, lengths and policy.

Throughputs are tokens generated in a second of prefill and decode together, with prompts of 512 tokens and 32 generated: from
FlexLLMGen's README for one T4 GPU with 208 GB of memory, and for four machines with one each from table 3 of Sheng et al. 2023,
"FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU". They were taken with dummy weights
and equal prompts; many are projected from a few decode steps.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from asyncpipe.errors import Invalid

PROMPT_LEN = 512
GEN_LEN = 32
ONE_T4 = "FlexLLMGen on 1x T4, published"
FOUR_T4 = "FlexGen on 4x T4, published"

ALL_ON_DEVICE = (100, 0, 100, 0, 100, 0)
ALL_ON_HOST = (0, 100, 0, 100, 0, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`policy` has only the fields that differ from the defaults."""

    model: str
    gpu_batch_size: int
    num_gpu_batches: int = 1
    stages: int = 1
    percent: tuple[int, ...]
    policy: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    published_tokens_per_s: float
    published_by: str = ONE_T4
    is_projected: bool = True  # the published figure
    about: str

    def settings(self) -> dict[str, Any]:
        """By the names of `bench`'s arguments, of the types that the parser gives."""
        return {
            "stages": self.stages,
            "num_inner_iterations": self.stages,
            "prompt_len": PROMPT_LEN,
            "gen_len": GEN_LEN,
            "gpu_batch_size": self.gpu_batch_size,
            "num_gpu_batches": self.num_gpu_batches,
            "percent": [str(percent) for percent in self.percent],
            **self.policy,
        }

    def flags(self) -> str:
        """As they could be typed."""
        parts = [f"--stages {self.stages}"] if self.stages > 1 else []
        parts += [f"--gpu-batch-size {self.gpu_batch_size}", f"--num-gpu-batches {self.num_gpu_batches}"]
        parts += [f"--percent {' '.join(map(str, self.percent))}"]
        for name, value in self.policy.items():
            flag = f"--{name.replace('_', '-')}"
            parts.append(flag if value is True else f"{flag} {str(value).lower()}")
        return " ".join(parts)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "opt-6.7b": Preset(
            model="facebook/opt-6.7b",
            gpu_batch_size=2,
            percent=ALL_ON_DEVICE,
            policy={"overlap": False},
            published_tokens_per_s=25.26,
            is_projected=False,
            about="everything on the device",
        ),
        "opt-6.7b-compressed": Preset(
            model="facebook/opt-6.7b",
            gpu_batch_size=72,
            percent=ALL_ON_DEVICE,
            policy={"overlap": False, "compress_weight": True, "compress_cache": True},
            published_tokens_per_s=29.12,
            is_projected=False,
            about="everything on the device, in 4 bits",
        ),
        "opt-30b": Preset(
            model="facebook/opt-30b",
            gpu_batch_size=48,
            num_gpu_batches=3,
            percent=(20, 80, 0, 100, 0, 100),
            policy={"cpu_cache_compute": True},
            published_tokens_per_s=7.32,
            about="weights and cache on the host, attention there too",
        ),
        "opt-30b-compressed": Preset(
            model="facebook/opt-30b",
            gpu_batch_size=64,
            num_gpu_batches=8,
            percent=ALL_ON_HOST,
            policy={"compress_cache": True},
            published_tokens_per_s=8.38,
            about="everything on the host, the cache in 4 bits",
        ),
        "opt-175b": Preset(
            model="facebook/opt-175b",
            gpu_batch_size=32,
            num_gpu_batches=8,
            percent=(0, 50, 0, 0, 0, 100),
            policy={"pin_weight": False, "cpu_cache_compute": True},
            published_tokens_per_s=0.69,
            about="half of the weights, and the cache, on disk",
        ),
        "opt-175b-compressed": Preset(
            model="facebook/opt-175b",
            gpu_batch_size=48,
            num_gpu_batches=3,
            percent=ALL_ON_HOST,
            policy={"pin_weight": False, "compress_weight": True, "compress_cache": True},
            published_tokens_per_s=1.12,
            about="everything on the host, in 4 bits",
        ),
        "opt-6.7b-4stages": Preset(
            model="facebook/opt-6.7b",
            stages=4,
            gpu_batch_size=24,
            percent=ALL_ON_DEVICE,
            published_tokens_per_s=201.12,
            published_by=FOUR_T4,
            about="everything on the devices",
        ),
        "opt-30b-4stages": Preset(
            model="facebook/opt-30b",
            stages=4,
            gpu_batch_size=64,
            num_gpu_batches=3,
            percent=(20, 80, 0, 100, 0, 100),
            policy={"cpu_cache_compute": True},
            published_tokens_per_s=23.61,
            published_by=FOUR_T4,
            about="weights and cache on the hosts, attention there too",
        ),
        "opt-175b-4stages": Preset(
            model="facebook/opt-175b",
            stages=4,
            gpu_batch_size=40,
            percent=ALL_ON_HOST,
            policy={"pin_weight": False, "cpu_cache_compute": True},
            published_tokens_per_s=2.33,
            published_by=FOUR_T4,
            about="everything on the hosts, attention there too",
        ),
    }
)


def find_preset(name: str) -> Preset:
    """Raises Invalid."""
    if (preset := PRESETS.get(name.lower().removeprefix("facebook/"))) is not None:
        return preset
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(PRESETS)}"
    raise Invalid(f"--preset {name}: there is none of this name; {hint}")


def preset_lines() -> list[str]:
    """A table for people."""
    width = max(map(len, PRESETS))
    lines = [f"Prompts of {PROMPT_LEN} tokens, {GEN_LEN} generated; tokens/s are of both together.", ""]
    for name, preset in PRESETS.items():
        projected = ", projected" if preset.is_projected else ""
        lines += [
            f"{name:{width}}  {preset.about}",
            f"{'':{width}}  {preset.flags()}",
            f"{'':{width}}  {preset.published_tokens_per_s:g} tokens/s ({preset.published_by}{projected})",
        ]
    return lines
