"""Decode as CUDA graphs, and products in eight and four bits, on a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asyncpipe_workers import decode_graph
from asyncpipe_workers.memory.quantization import GroupCodec, RowCodec
from asyncpipe_workers.models.int4 import Int4Linear
from asyncpipe_workers.models.int8 import Int8Linear
from asyncpipe_workers.models.quantized import QuantizedLinears
from asyncpipe_workers.stage_model import StageModel
from tests.checkpoints import distinct_prompts
from tests.families import make_family, reference_tokens
from tests.stage_chains import Chain, load_chain

NUM_TOKENS = 24


@pytest.mark.parametrize("family", ["gpt2", "llama3", "mistral", "qwen3", "phi3", "gemma2", "mixtral"])
def test_every_family_gives_hugging_faces_tokens(
    family: str, card: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, prompts = make_family(tmp_path, family), distinct_prompts(5)
    chain = Chain(load_chain(path, (2, 1), device=str(card)))
    assert chain.generate(prompts, max_new_tokens=NUM_TOKENS) == reference_tokens(path, prompts, max_new_tokens=NUM_TOKENS)
    assert not caplog.records, "a step could not be captured"


def test_steady_decode_is_replayed(card: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[int] = []
    original = decode_graph.DecodeGraphs.run

    def run(self: decode_graph.DecodeGraphs, work: decode_graph.Work) -> torch.Tensor | None:
        output = original(self, work)
        replayed.append(output is not None)
        return output

    monkeypatch.setattr(decode_graph.DecodeGraphs, "run", run)
    stages: list[StageModel] = load_chain(make_family(tmp_path, "llama3"), (3,), device=str(card))
    Chain(stages).generate(distinct_prompts(4), max_new_tokens=NUM_TOKENS)
    assert sum(replayed) > NUM_TOKENS // 2


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize(("codec", "form"), [(RowCodec(), Int8Linear), (GroupCodec(64), Int4Linear)])
def test_quantized_products_multiply_what_their_codecs_would_unpack(
    codec: RowCodec | GroupCodec, form: type[object], rows: int, card: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((96, 256), (96,), (rows, 256)))
    packed = codec.encode(weight)
    linear = QuantizedLinears(codec, card, torch.bfloat16).of_packed(packed, 256, bias.to(card, torch.bfloat16))
    assert isinstance(linear, form)
    expected = torch.nn.functional.linear(x, codec.decode(packed, 256, dtype=torch.float32), bias)
    found = linear(x.to(card, torch.bfloat16)).float().cpu()
    assert (found - expected).norm() < 0.02 * expected.norm()
