"""Kernels that are compiled for this processor beside torch's: what bounds a decode step on a CPU.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --quick --json

Products with the weights of some layers, one after the other, so that each is read from memory and not from a cache; and
attention of sequences' newest tokens, writing their keys and values included. Everybody in turn. `int8_b1` is for one row of
input: the rates at which weights are read, in GB/s, and `ratio`, the time of torch's quickest form over the compiled one's.
`read_GB_s` is the rate of adding up as many bytes, which is what one can hope for.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from peer_cases import THREADS
from report import in_turn, print_result

from asyncpipe_workers.attention import QKV, KeysValues, attend_rows
from asyncpipe_workers.compiled.linears import CompiledFloatLinear, CompiledInt4Linear, CompiledInt8Linear
from asyncpipe_workers.layout import Row, Seen
from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec
from asyncpipe_workers.models.int4 import Int4Linear
from asyncpipe_workers.models.int8 import Int8Linear
from asyncpipe_workers.models.kernels import PackedLinear, PlainLinear, ResidentLinear
from asyncpipe_workers.newest import NewestAttention

HIDDEN = 2048
SHAPES = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN))  # a layer of OPT-1.3b
WEIGHT_BYTES = 400 << 20  # of all layers, far more than a cache holds
QUICK_WEIGHT_BYTES = 200 << 20
HEADS, KV_HEADS, HEAD_SIZE, LENGTH, CAPACITY = 32, (32, 4), 64, 160, 192
KV_BYTES = 200 << 20
ROUNDS = 7

Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=THREADS, help=f"default: {THREADS}")
    parser.add_argument("--quick", action="store_true", help="fewer layers and batches: under 60 s")
    parser.add_argument("--json", action="store_true", help="print rates and ratios as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = (1, 8) if arguments.quick else (1, 2, 4, 8, 32, 128)
    result: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for kind in ("fp32", "int8", "int4"):
            result |= products(kind, batches, QUICK_WEIGHT_BYTES if arguments.quick else WEIGHT_BYTES)
        for kv_heads in KV_HEADS:
            for batch in batches[:-1]:
                result[f"attention_{HEADS // kv_heads}_heads_b{batch}"] = attention(batch, kv_heads)
    print_result(result, as_json=arguments.json)


def products(kind: str, batches: Sequence[int], num_bytes: int) -> Iterator[tuple[str, dict[str, float]]]:
    layers: list[tuple[int, dict[str, ResidentLinear]]] = []
    while sum(forms["compiled"].num_bytes for _, forms in layers) < num_bytes:
        layers += [(in_size, made(kind, torch.randn(out_size, in_size))) for out_size, in_size in SHAPES]
    num_bytes = sum(forms["compiled"].num_bytes for _, forms in layers)
    memory = torch.ones(num_bytes // 8, dtype=torch.int64)
    for batch in batches:
        rows = {in_size: torch.randn(batch, in_size) for in_size in {in_size for in_size, _ in layers}}

        def multiply(form: str, rows: Mapping[int, torch.Tensor] = rows) -> None:
            for in_size, forms in layers:
                forms[form](rows[in_size])

        forms = {form: partial(multiply, form) for form in layers[0][1]}
        yield f"{kind}_b{batch}", rates(num_bytes, forms | {"read": memory.sum})


def made(kind: str, weight: torch.Tensor) -> dict[str, ResidentLinear]:
    codec, in_size = GroupCodec(), weight.shape[1]
    if kind == "fp32":
        return {
            "compiled": CompiledFloatLinear(weight, None),
            "oneDNN": PackedLinear(weight, None),
            "MKL": PlainLinear(weight, None),
        }
    if kind == "int4":
        packed = codec.encode(weight)
        return {"compiled": CompiledInt4Linear(codec, packed, in_size, None), "torch": Int4Linear(codec, packed, in_size, None)}
    packed = RowCodec().encode(weight)
    by_torch = Int8Linear(packed, in_size, None)
    by_torch.pack()
    return {"compiled": CompiledInt8Linear(packed, in_size, None), "torch": by_torch}


def attention(batch: int, kv_heads: int) -> dict[str, float]:
    layer_bytes = 2 * batch * kv_heads * LENGTH * HEAD_SIZE * 4
    caches = [
        KeysValues(*(torch.randn(batch, kv_heads, CAPACITY, HEAD_SIZE) for _ in range(2)))
        for _ in range(max(KV_BYTES // layer_bytes, 1))
    ]
    new = (torch.randn(batch, kv_heads, HEAD_SIZE) for _ in range(2))
    qkv = QKV(torch.randn(batch, HEADS, HEAD_SIZE), *new)
    compiled = NewestAttention(shared=HEADS // kv_heads, size=HEAD_SIZE, softcap=None)
    seen = Seen.of([Row(slot, LENGTH) for slot in range(batch)], None)

    def by_kernel() -> None:
        for cache in caches:
            compiled(qkv, cache, seen)

    def by_products() -> None:
        for keys, values in caches:
            keys[:, :, LENGTH - 1], values[:, :, LENGTH - 1] = qkv.k_TGK, qkv.v_TGK
            attend_rows(qkv.q_THK, keys[:, :, :LENGTH], values[:, :, :LENGTH])

    memory = torch.ones(len(caches) * layer_bytes // 8, dtype=torch.int64)
    return rates(len(caches) * layer_bytes, {"compiled": by_kernel, "products": by_products, "read": memory.sum})


def rates(num_bytes: int, works: Mapping[str, Work]) -> dict[str, float]:
    """GB/s of each, and the time of the quickest other over that of the compiled one: medians, the ratio round by round."""
    once = {name: partial(seconds, work) for name, work in works.items()}
    times = asyncio.run(in_turn({"": once}, ROUNDS))[""]
    found = {f"{name}_GB_s": num_bytes / statistics.median(each) / 1e9 for name, each in times.items()}
    others = zip(*(each for name, each in times.items() if name not in ("compiled", "read")), strict=True)
    ratios = [min(other) / own for own, other in zip(times["compiled"], others, strict=True)]
    return {name: round(value, 2) for name, value in (found | {"ratio": statistics.median(ratios)}).items()}


async def seconds(work: Work) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
