"""What `peers.py` compares: shapes of models, engines at their precisions, and what they are asked to generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from random_model import OPT_125M, LlamaShape, MoEShape, Shape, make_large_llama, make_large_model, make_large_moe

THREADS = 2
PROMPT_LEN = 128
NEW_TOKENS = 32
LONG_PROMPT_LEN = 2040  # with its new token it fits into 2,048 positions
CONTEXT_LEN = 2048
MAX_STEP_TOKENS = 4096
KV_BLOCK_TOKENS = 32
DEFAULT_BATCHES = (1, 8, 32)


class Workload(NamedTuple):
    """Distinct random prompts, all at once."""

    name: str
    batch: int
    prompt_len: int = PROMPT_LEN
    new_tokens: int = NEW_TOKENS


PREFILL = Workload("prefill", 1, LONG_PROMPT_LEN, new_tokens=1)


def batch_workload(batch: int) -> Workload:
    return Workload(f"b{batch}", batch)


class Model(NamedTuple):
    """`dtype` is that in which its weights are stored."""

    name: str
    shape: Shape | LlamaShape | MoEShape
    dtype: str

    @property
    def family(self) -> str:
        return "opt" if isinstance(self.shape, Shape) else "llama" if isinstance(self.shape, LlamaShape) else "moe"

    def make(self, directory: Path) -> int:
        """Random weights in `directory`; returns their bytes."""
        match self.shape:
            case Shape():
                return make_large_model(directory, self.shape, dtype=self.dtype)
            case LlamaShape():
                return make_large_llama(directory, self.shape, dtype=self.dtype)
            case MoEShape():
                return make_large_moe(directory, self.shape, dtype=self.dtype)

    @property
    def kv_bytes_per_token(self) -> int:
        """In float32."""
        shape = self.shape
        size = shape.hidden if isinstance(shape, Shape) else shape.kv_heads * (shape.hidden // shape.heads)
        return shape.layers * 2 * size * 4


MODELS = {
    model.name: model
    for model in (
        Model("opt-125m", OPT_125M, "float16"),
        Model("opt-1.3b", Shape(hidden=2048, layers=24, vocab=50_272), "float16"),
        Model(
            "llama-1.1b",
            LlamaShape(hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632, vocab=32_000),
            "bfloat16",
        ),
    )
}
"""Stored as they are published."""

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class Case(NamedTuple):
    """An engine at a precision. `package` is what must be installed for it, `families` are the models it is asked for."""

    name: str
    engine: str  # a key of peer_engines.ENGINES
    precision: str
    bytes_per_weight: float
    stages: int = 1
    package: str = "transformers"
    families: tuple[str, ...] = ("opt", "llama")

    @property
    def is_ours(self) -> bool:
        return self.engine == "ours"

    def missing_for(self, model: Model) -> str | None:
        """Why there is nothing to compare; None: there is."""
        return None if model.family in self.families else f"only for {', '.join(self.families)} models"


def _llamacpp(precision: str, bytes_per_weight: float) -> Case:
    name = f"llamacpp_{precision}"
    return Case(name, "llamacpp", precision, bytes_per_weight, package="llama_cpp", families=("llama",))


CASES = {
    case.name: case
    for case in (
        Case("ours_fp32", "ours", "fp32", 4),
        Case("ours_int8", "ours", "int8", 1),
        Case("ours_int4", "ours", "int4", 0.5),
        Case("ours_fp32_2x1", "ours", "fp32", 4, stages=2),
        Case("ours_int8_2x1", "ours", "int8", 1, stages=2),
        Case("hf_fp32", "hf", "fp32", 4),
        Case("hf_bf16", "hf", "bf16", 2),
        Case("hf_int8", "hf", "int8", 1),
        Case("ct2_fp32", "ct2", "float32", 4, package="ctranslate2"),
        Case("ct2_int8", "ct2", "int8", 1, package="ctranslate2"),
        _llamacpp("f16", 2),
        _llamacpp("q8_0", 1),
        _llamacpp("q4_0", 0.5),
    )
}
QUICK_CASES = ("ours_fp32", "ours_int8", "hf_fp32", "ct2_fp32", "ct2_int8")
PREFILL_CASES = ("ours_fp32", "ours_int8", "hf_fp32")


def kv_bytes(model: Model, *, max_batch: int, stages: int) -> int:
    """Of each stage of ours: for all sequences to their ends, and a block each to spare."""
    tokens = max(max_batch * (PROMPT_LEN + NEW_TOKENS + KV_BLOCK_TOKENS), CONTEXT_LEN + KV_BLOCK_TOKENS)
    return -(-tokens * model.kv_bytes_per_token // stages)


def engine_spec(case: Case, model: Model, *, folder: Path, max_batch: int) -> dict[str, Any]:
    """What a child is told of the engine it is to be."""
    return {
        "engine": case.engine,
        "precision": case.precision,
        "stages": case.stages,
        "model": str(folder / "model"),
        "converted": str(folder / case.name),
        "vocab": model.shape.vocab,
        "threads": THREADS,
        "max_sequences": max_batch,
        "max_step_tokens": min(max(max_batch * PROMPT_LEN, CONTEXT_LEN), MAX_STEP_TOKENS),
        "kv_bytes": kv_bytes(model, max_batch=max_batch, stages=case.stages),
    }
