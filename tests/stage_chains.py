"""Stages chained in one process, each step through the wire format between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asyncpipe.wire.codec import Codec, encode
from asyncpipe.wire.messages import Chunk, Delta, LoadStage, Opened, Sampling, Step, ToStage
from asyncpipe_workers.output import ArrivedStep
from asyncpipe_workers.stage_model import StageModel


def load_chain(
    path: Path, split: tuple[int, ...], dtype: str = "float32", *, device: str = "cpu", **plan: Any
) -> list[StageModel]:
    """One stage for each entry of `split`; `plan` are more fields of LoadStage."""
    bounds = [sum(split[:stage]) for stage in range(len(split) + 1)]
    return [
        StageModel.load(
            LoadStage(
                epoch=1,
                stage=stage,
                num_stages=len(split),
                first_layer=bounds[stage],
                last_layer=bounds[stage + 1],
                checkpoint=str(path),
                config_json=(path / "config.json").read_text(),
                dtype=dtype,
                max_sequences=16,
                kv_block_tokens=16,
                kv_bytes=64 << 20,
                **({"max_context_len": 160} | plan),
            ),
            device=device,
        )
        for stage in range(len(split))
    ]


class Chain:
    """Stages in a row; each step goes through the wire format between them."""

    def __init__(self, stages: list[StageModel]) -> None:
        self._stages = stages
        self._codec: Codec[Step] = Codec(ToStage)
        self._step = 0

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, chunk: int = 10**6) -> list[list[int]]:
        """All prompts in one micro-batch, `chunk` tokens of each prompt a step."""
        self(Delta(opened=tuple(opened(n, prompt) for n, prompt in enumerate(prompts))))
        order: list[int] = []
        tokens: list[list[int]] = [[] for _ in prompts]
        done = [0] * len(prompts)
        while len(tokens[order[-1]] if order else []) < max_new_tokens or any(len(t) < max_new_tokens for t in tokens):
            chunks = []
            for number, prompt in enumerate(prompts):
                if count := min(len(prompt) - done[number], chunk):
                    chunks.append(Chunk(number, count))
                    done[number] += count
            delta = Delta(token_ids=tuple(tokens[n][-1] for n in order), chunks=tuple(chunks))
            order += [one.sequence for one in chunks if done[one.sequence] == len(prompts[one.sequence])]
            for number, token in zip(order, self(delta), strict=True):
                tokens[number].append(token)
        self(Delta(left=tuple(order)))
        return [one[:max_new_tokens] for one in tokens]

    def __call__(self, delta: Delta, micro_batch: int = 0) -> tuple[int, ...]:
        message = Step(epoch=1, micro_batch=micro_batch, step=self._step, delta=delta)
        self._step += 1
        for stage in self._stages:
            (output,) = stage.compute([ArrivedStep(self._codec.decode(encode(message)), 0)])
            message = Step(epoch=1, micro_batch=micro_batch, step=message.step, delta=delta, hidden=output.hidden)
        return output.token_ids

    def close(self) -> None:
        for stage in self._stages:
            stage.close()


def opened(number: int, prompt: list[int], **options: Any) -> Opened:
    return Opened(number, tuple(prompt), len(prompt), Sampling(**options))


def joining(*sequences: Opened, **changes: Any) -> Delta:
    """All of them begin, and are computed to their ends."""
    return Delta(opened=sequences, chunks=tuple(Chunk(one.sequence, len(one.token_ids)) for one in sequences), **changes)
