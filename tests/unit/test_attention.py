"""Attention of chunks, and of several sequences' newest tokens: every way of computing it gives what the definition gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from asyncpipe_workers import chunks
from asyncpipe_workers.attention import PLAIN, QKV, AttentionForm, KeysValues
from asyncpipe_workers.chunks import attend_chunk
from asyncpipe_workers.layout import Row, StepLayout
from asyncpipe_workers.memory import kv as kv_memory
from asyncpipe_workers.memory.kv import ArenaKV, KVCache, KVShape, PagedKV
from asyncpipe_workers.newest import NewestAttention

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


@pytest.fixture(params=["torch", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For a chunk of any length, however this machine would choose; torch's products are of few scores at a time."""
    monkeypatch.setattr(chunks, "MIN_ROWS_TO_COMPILE", 0)
    monkeypatch.setattr(chunks, "SCORE_NUMBERS", 200)
    if request.param == "compiled":
        request.getfixturevalue("compiled_kernels")
    else:
        monkeypatch.setattr(chunks, "compiled_attention", lambda **_: None)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kept", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("num", "total"), [(21, 21), (21, 40), (1, 64), (90, 150)])
@pytest.mark.parametrize(
    "form",
    [PLAIN, *(AttentionForm(window) for window in (7, 30, 70)), AttentionForm(softcap=2.0), AttentionForm(30, softcap=2.0)],
    ids=str,
)
def test_every_way_gives_what_the_definition_gives(
    form: AttentionForm, num: int, total: int, groups: int, kept: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(num, 12, HEAD_SIZE, generator=generator)  # queries lie apart, as in a fused product
    kv_GCK = KeysValues(*torch.randn(2, groups, total + 9, HEAD_SIZE, generator=generator).to(kept))
    for each in kv_GCK:
        each[:, total:] = math.nan  # what a cache may have behind a sequence
    kv_GCK = KeysValues(*(each[:, :total] for each in kv_GCK))
    found = attend_chunk(qkv[:, :4], kv_GCK, form)
    torch.testing.assert_close(found, by_definition(qkv[:, :4], kv_GCK, form), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_keys_and_values_may_lie_token_by_token() -> None:
    q_THK = torch.randn(90, 4, HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    kv_CGK = torch.randn(2, 150, 2, HEAD_SIZE, generator=torch.Generator().manual_seed(1))
    kv_GCK = KeysValues(*kv_CGK.transpose(1, 2))
    torch.testing.assert_close(attend_chunk(q_THK, kv_GCK), by_definition(q_THK, kv_GCK, PLAIN), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled_kernels", "lanes")
@pytest.mark.parametrize("kept", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", [PLAIN, AttentionForm(window=70), AttentionForm(softcap=2.0)], ids=str)
def test_what_a_query_gives_does_not_depend_on_its_chunk(form: AttentionForm, kept: torch.dtype) -> None:
    """To the last bit, where chunks are compiled."""
    q_THK = torch.randn(300, 4, HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    kv_GCK = KeysValues(*torch.randn(2, 2, 300, HEAD_SIZE, generator=torch.Generator().manual_seed(1)).to(kept))
    whole = attend_chunk(q_THK, kv_GCK, form)
    torch.testing.assert_close(whole, by_definition(q_THK, kv_GCK, form), rtol=1e-5, atol=1e-5)
    for start, end in ((0, 77), (77, 200), (200, 300)):
        seen = KeysValues(*(each[:, :end] for each in kv_GCK))
        assert attend_chunk(q_THK[start:end], seen, form).equal(whole[start:end])


# --- newest tokens of several sequences ---


def attended_rows(cache: KVCache, kept: list[KeysValues], q_NHK: torch.Tensor, form: AttentionForm) -> torch.Tensor:
    """The newest token of each of `kept`, (C, G, K) each, whose other tokens are written first; in slots 0, 1 and so on."""
    rows = [Row(cache.open(), len(kv.keys_GCK)) for kv in kept]
    for row in rows:
        cache.reserve(row.slot, row.length)
    for row, kv in zip(rows, kept, strict=True):
        before = KeysValues(*(each[: row.length - 1] for each in kv))
        cache.write_span(0, row.slot, 0, before)  # type: ignore[attr-defined]
    newest = KeysValues(*(torch.stack(each) for each in zip(*((keys[-1], values[-1]) for keys, values in kept), strict=True)))
    layout = StepLayout([0] * len(rows), torch.tensor([row.length - 1 for row in rows]), rows, [], 0)
    return cache.attend(0, QKV(q_NHK, *newest), layout, form)


def kv_shape(groups: int, kept: torch.dtype = torch.float32) -> KVShape:
    return KVShape(
        num_layers=2,
        num_heads=groups,
        head_size=HEAD_SIZE,
        dtype=kept,
        max_context_len=64,
        max_sequences=8,
        block_tokens=16,
    )


@pytest.fixture(params=["products", "compiled"])
def rows_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For newest tokens, however this machine would choose."""

    def newest_attention(**what: Any) -> NewestAttention | None:
        return NewestAttention(**what) if request.param == "compiled" else None

    if request.param == "compiled":
        try:
            NewestAttention(shared=1, size=HEAD_SIZE, softcap=None)
        except (ImportError, NotImplementedError) as error:
            pytest.skip(str(error))
    monkeypatch.setattr(kv_memory, "newest_attention", newest_attention)
    return str(request.param)


@pytest.mark.usefixtures("rows_way")
@pytest.mark.parametrize("kept_in", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(9,), (20, 20, 20), (5, 21, 1, 13)], ids=str)
@pytest.mark.parametrize(
    "form", [PLAIN, AttentionForm(window=7), AttentionForm(softcap=2.0), AttentionForm(window=3, softcap=0.5)], ids=str
)
def test_rows_of_several_sequences_give_what_the_definition_gives(
    form: AttentionForm, lengths: tuple[int, ...], groups: int, kept_in: torch.dtype
) -> None:
    """However their lengths differ, and wherever in the cache they are."""
    generator, shape = torch.Generator().manual_seed(0), kv_shape(groups, kept_in)
    kept = [KeysValues(*torch.randn(2, n, groups, HEAD_SIZE, generator=generator).to(kept_in).float()) for n in lengths]
    q_NHK = torch.randn(len(lengths), 4, HEAD_SIZE, generator=generator)
    expected = torch.cat(
        [
            by_definition(q_NHK[row : row + 1], KeysValues(*(each.transpose(0, 1) for each in kv)), form)
            for row, kv in enumerate(kept)
        ]
    )
    caches: list[KVCache] = [ArenaKV(shape, num_blocks=24)]
    if kept_in == torch.float32:
        caches.append(PagedKV(shape, num_blocks=24, device=torch.device("cpu")))
    for cache in caches:
        for _ in range(2):
            found = attended_rows(cache, kept, q_NHK, form)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("rows_way")
def test_layers_of_different_windows_in_one_step_do_not_share_masks() -> None:
    cache, newest = ArenaKV(kv_shape(1), num_blocks=8), torch.ones(2, 1, HEAD_SIZE)
    rows = [Row(cache.open(), length) for length in (2, 4)]
    for row in rows:
        cache.reserve(row.slot, row.length)
        cache.write_span(0, row.slot, 0, KeysValues(*(torch.zeros(row.length - 1, 1, HEAD_SIZE) for _ in range(2))))
    layout = StepLayout([0, 0], torch.tensor([1, 3]), rows, [], 0)
    for form, seen in ((PLAIN, (2, 4)), (AttentionForm(window=3), (2, 3)), (AttentionForm(window=4), (2, 4))):
        found = cache.attend(0, QKV(torch.zeros(2, 1, HEAD_SIZE), newest, newest), layout, form)
        torch.testing.assert_close(found[:, 0, 0], torch.tensor([1 / seen[0], 1 / seen[1]]))
