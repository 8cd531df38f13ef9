"""A chunk's attention: every way of computing it gives what the definition gives."""

from __future__ import annotations

import math

import pytest
import torch

from asyncpipe_workers import attention
from asyncpipe_workers.attention import PLAIN, AttentionForm, KeysValues, attend_chunk

HEAD_SIZE = 16


def by_definition(q_THK: torch.Tensor, kv_GCK: KeysValues, form: AttentionForm) -> torch.Tensor:
    """In float64, one query and head at a time."""
    (num, num_heads, size), (groups, total) = q_THK.shape, kv_GCK.keys_GCK.shape[:2]
    out_THK = torch.empty_like(q_THK)
    for query in range(num):
        end = total - num + query + 1
        start = 0 if form.window is None else max(end - form.window, 0)
        for head in range(num_heads):
            keys_CK, values_CK = (each[head * groups // num_heads, start:end].double() for each in kv_GCK)
            scores_C = keys_CK @ q_THK[query, head].double() / math.sqrt(size)
            if form.softcap is not None:
                scores_C = torch.tanh(scores_C / form.softcap) * form.softcap
            out_THK[query, head] = (torch.softmax(scores_C, 0) @ values_CK).float()
    return out_THK


@pytest.fixture(params=["fused", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For a chunk of any length, however this machine would choose; products of few scores at a time."""
    monkeypatch.setattr(attention, "MIN_SCORES_FOR_PRODUCTS", 0)
    monkeypatch.setattr(attention, "SCORE_NUMBERS", 200)
    monkeypatch.setattr(attention, "products_beat_fused", lambda: request.param == "products")
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("total", [21, 40])
@pytest.mark.parametrize(
    "form", [PLAIN, AttentionForm(window=7), AttentionForm(window=30), AttentionForm(softcap=2.0)], ids=str
)
def test_every_way_gives_what_the_definition_gives(form: AttentionForm, total: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(21, 12, HEAD_SIZE, generator=generator)  # queries lie apart, as in a fused product
    keys, values = (torch.randn(groups, 50, HEAD_SIZE, generator=generator)[:, :total] for _ in range(2))
    kv_GCK = KeysValues(keys, values)
    found = attend_chunk(qkv[:, :4], kv_GCK, form)
    torch.testing.assert_close(found, by_definition(qkv[:, :4], kv_GCK, form), rtol=1e-5, atol=1e-5)
