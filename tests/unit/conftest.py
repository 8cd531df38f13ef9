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
    from asyncpipe_workers.memory import kv
    from asyncpipe_workers.models import kernels
    from asyncpipe_workers.newest import NewestAttention

    try:
        NewestAttention(shared=1, size=16, softcap=None)
    except (ImportError, NotImplementedError) as error:
        pytest.skip(str(error))
    monkeypatch.setattr(kernels, "quickest_form", lambda *_: "compiled")
    monkeypatch.setattr(kv, "newest_attention", lambda **what: NewestAttention(**what))
