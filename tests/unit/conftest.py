"""Fixtures that unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread within the test."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever there is one it is used, however this machine would choose."""
    from asyncpipe_workers import chunks
    from asyncpipe_workers.memory import kv
    from asyncpipe_workers.models import kernels
    from asyncpipe_workers.newest import NewestAttention

    try:
        NewestAttention(shared=1, size=16, softcap=None)
    except (ImportError, NotImplementedError) as error:
        pytest.skip(str(error))
    monkeypatch.setattr(kernels, "quickest_form", lambda *_: "compiled")
    monkeypatch.setattr(kv, "newest_attention", lambda **what: NewestAttention(**what))
    monkeypatch.setattr(chunks, "compiled_attention", lambda **what: chunks.CompiledAttention(**what))


@pytest.fixture(params=[16, 8], ids=["16-lanes", "8-lanes"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels have vectors of so many; a processor with wide ones has narrow ones too."""
    kernel = pytest.importorskip("asyncpipe_workers.compiled.kernel")
    compiler = pytest.importorskip("asyncpipe_workers.compiled.compiler")
    if request.param == 8:
        for features in (kernel.FLOAT_FEATURES, kernel.HALF_FEATURES, kernel.BYTE_FEATURES, kernel.WORD_FEATURES):
            monkeypatch.delitem(features, 16)
        if not compiler.host_features().get("avxvnni"):
            monkeypatch.setitem(kernel.BYTE_FEATURES, 8, ["avx512vnni", "avx512vl"])
    try:
        found = compiler.lanes_of(kernel.Kernel)
    except NotImplementedError as error:
        pytest.skip(str(error))
    if found != request.param:
        pytest.skip(f"this processor has no vectors of {request.param} floats")
