"""The child of `peers.py`: one engine, told by lines of JSON on its standard input what to generate, answering with timings.

Each engine is a context manager that yields `run(prompts, new_tokens)`; what it needs on disk is made once, by `PREPARE`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import peer_llamacpp

from asyncpipe.process import die_with_parent
from asyncpipe_coordinator.bench_metrics import TOGETHER_S

RUN_TIMEOUT_S = 1800.0
WARM_UP = {"prompt_len": 128, "new_tokens": 32, "seed": 0}  # as large as what is timed: memory is got and kept
FIRST_TOKEN_ID = 4  # those below are special ones in both vocabularies
MAX_ERROR_CHARS = 200

Spec = dict[str, Any]
Prompts = list[list[int]]


class Timing(NamedTuple):
    """Seconds from the start: to the first token of the last sequence, and to the last token of all; and of a decode step, the
    mean of those in which every sequence took part (an engine may begin to decode some before it has seen all prompts, and
    may send the tokens of some steps together)."""

    first_s: float
    total_s: float
    step_s: float


class Arrivals:
    """When tokens came, since this was made."""

    def __init__(self, *, batch: int, new_tokens: int) -> None:
        self._expected = dict.fromkeys(range(new_tokens), batch)
        self._counts: Counter[int] = Counter()
        self._first_s = self._last_s = 0.0
        self._reached_s: list[float] = []  # by the first sequence, each index
        self._start_s = time.perf_counter()

    def add(self, index: int) -> None:
        """A sequence's token number `index`."""
        self._last_s = time.perf_counter() - self._start_s
        self._counts[index] += 1
        if index == len(self._reached_s):
            self._reached_s.append(self._last_s)
        if index == 0:
            self._first_s = self._last_s

    def timing(self) -> Timing:
        """Raises RuntimeError unless every sequence got all its tokens."""
        if self._counts != self._expected:
            raise RuntimeError(f"{sum(self._counts.values())} tokens came, not {sum(self._expected.values())}")
        return Timing(self._first_s, self._last_s, self._step_s())

    def _step_s(self) -> float:
        """A decode step's, until the first sequence ends."""
        reached_s, start_s = [at_s for at_s in self._reached_s if at_s > self._first_s + TOGETHER_S], self._first_s
        if not reached_s:
            start_s, *reached_s = self._reached_s
        return (reached_s[-1] - start_s) / len(reached_s) if reached_s else 0.0


Run = Callable[[Prompts, int], Awaitable[Timing]]


@asynccontextmanager
async def ours(spec: Spec) -> AsyncIterator[Run]:
    import asyncpipe

    options: dict[str, Any] = {} if spec["precision"] == "fp32" else {"quantize": spec["precision"]}
    async with asyncpipe.local(
        spec["model"],
        stages=spec["stages"],
        threads_per_stage=spec["threads"] // spec["stages"],
        micro_batches=1 if spec["stages"] == 1 else None,
        max_sequences=spec["max_sequences"],
        max_step_tokens=spec["max_step_tokens"],
        kv_memory=spec["kv_bytes"],
        **options,
    ) as client:

        async def run(prompts: Prompts, new_tokens: int) -> Timing:
            arrivals = Arrivals(batch=len(prompts), new_tokens=new_tokens)

            async def one(prompt: list[int]) -> None:
                async for piece in client.stream(prompt, max_new_tokens=new_tokens, ignore_eos=True, timeout_s=RUN_TIMEOUT_S):
                    arrivals.add(piece.index)

            await asyncio.gather(*(one(prompt) for prompt in prompts))
            return arrivals.timing()

        yield run


@asynccontextmanager
async def hugging_face(spec: Spec) -> AsyncIterator[Run]:
    """`generate`, in float32 or bfloat16, or with torch's dynamically quantized linears (int8: weights and activations)."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(spec["threads"])
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).eval()
    if spec["precision"] == "int8":
        # A head that shares its weights with the embeddings gets a packed copy; the embeddings stay as they are.
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=1, use_cache=True)

    class Streamer(BaseStreamer):  # type: ignore[no-untyped-call, misc]
        """Is given the prompts first, and then a token of every sequence at each step."""

        def __init__(self, arrivals: Arrivals) -> None:
            self.arrivals, self.step = arrivals, -1

        def put(self, value: torch.Tensor) -> None:
            if self.step >= 0:
                for _ in range(value.numel()):
                    self.arrivals.add(self.step)
            self.step += 1

        def end(self) -> None:
            pass

    async def run(prompts: Prompts, new_tokens: int) -> Timing:
        token_ids = torch.tensor(prompts)
        arrivals = Arrivals(batch=len(prompts), new_tokens=new_tokens)
        with torch.inference_mode():
            model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=new_tokens,
                streamer=Streamer(arrivals),
            )
        return arrivals.timing()

    yield run


def word(token_id: int) -> str:
    """CTranslate2 knows tokens by their text."""
    return f"t{token_id}"


@asynccontextmanager
async def ctranslate2(spec: Spec) -> AsyncIterator[Run]:
    import ctranslate2

    generator = ctranslate2.Generator(
        spec["converted"], compute_type=spec["precision"], inter_threads=1, intra_threads=spec["threads"]
    )

    async def run(prompts: Prompts, new_tokens: int) -> Timing:
        words = [[word(token_id) for token_id in prompt] for prompt in prompts]
        counts: Counter[int] = Counter()
        arrivals = Arrivals(batch=len(prompts), new_tokens=new_tokens)

        def on_token(result: Any) -> bool:
            arrivals.add(counts[result.batch_id])
            counts[result.batch_id] += 1
            return False

        generator.generate_batch(
            words,
            include_prompt_in_result=False,
            max_length=new_tokens,
            min_length=new_tokens,  # which forbids the end token until then
            beam_size=1,
            sampling_topk=1,
            callback=on_token,
        )
        return arrivals.timing()

    yield run


def convert_for_ctranslate2(spec: Spec) -> None:
    from ctranslate2.converters import TransformersConverter

    class Vocabulary:
        """All that the converter asks a tokenizer for."""

        unk_token, bos_token, eos_token = word(0), word(1), word(2)

        def get_vocab(self) -> dict[str, int]:
            return {word(token_id): token_id for token_id in range(spec["vocab"])}

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *_: Any, **__: Any) -> Vocabulary:
            return Vocabulary()

    Converter(spec["model"]).convert(spec["converted"], quantization=spec["precision"])


@asynccontextmanager
async def llamacpp(spec: Spec) -> AsyncIterator[Run]:
    with peer_llamacpp.open_model(Path(spec["converted"]), threads=spec["threads"]) as decoder:

        async def run(prompts: Prompts, new_tokens: int) -> Timing:
            with decoder.session(prompts, new_tokens=new_tokens) as session:
                arrivals = Arrivals(batch=len(prompts), new_tokens=new_tokens)
                for index in range(new_tokens):
                    for _ in session.step():
                        arrivals.add(index)
                return arrivals.timing()

        yield run


def convert_for_llamacpp(spec: Spec) -> None:
    peer_llamacpp.convert(Path(spec["model"]), Path(spec["converted"]), precision=spec["precision"])


ENGINES: dict[str, Callable[[Spec], AbstractAsyncContextManager[Run]]] = {
    "ours": ours,
    "hf": hugging_face,
    "ct2": ctranslate2,
    "llamacpp": llamacpp,
}
PREPARE: dict[str, Callable[[Spec], None]] = {"ct2": convert_for_ctranslate2, "llamacpp": convert_for_llamacpp}


# --- the child --------------------------------------------------------------------------------------------------------


def make_prompts(*, batch: int, length: int, vocab: int, seed: int) -> Prompts:
    """Distinct ones, the same for every engine."""
    rng = random.Random(seed)
    return [[rng.randrange(FIRST_TOKEN_ID, vocab) for _ in range(length)] for _ in range(batch)]


async def generate(run: Run, spec: Spec, order: dict[str, int]) -> Timing:
    prompts = make_prompts(batch=order["batch"], length=order["prompt_len"], vocab=spec["vocab"], seed=order["seed"])
    return await run(prompts, order["new_tokens"])


async def serve(spec: Spec, reply: Callable[[dict[str, Any]], None]) -> None:
    """Until standard input ends. An engine that fails a run is given up: its process ends with the reason."""
    async with ENGINES[spec["engine"]](spec) as run:
        await generate(run, spec, WARM_UP | {"batch": spec["max_sequences"]})
        reply({"ready": True})
        while line := await asyncio.to_thread(sys.stdin.readline):
            reply((await generate(run, spec, json.loads(line)))._asdict())


def describe(error: BaseException) -> str:
    """In one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:MAX_ERROR_CHARS]


def main() -> None:
    die_with_parent()
    spec = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no reply

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        if spec.pop("prepare", False):
            PREPARE[spec["engine"]](spec)
            reply({"ready": True})
        else:
            asyncio.run(serve(spec, reply))
    except Exception as error:
        reply({"error": describe(error)})
        raise


if __name__ == "__main__":
    main()
