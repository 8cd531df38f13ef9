"""Tests of what runs on a card run on an emulated one too, so that they run everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.emulated_cuda import emulated_cuda

NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
OWN_KERNELS = pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has kernels for CUDA of its own")


@pytest.fixture(
    params=[
        pytest.param("real", marks=[pytest.mark.gpu, NO_CARD]),
        pytest.param("emulated", marks=OWN_KERNELS),
    ]
)
def card(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Of two emulated ones it is the second: what forgets to say which card it means gets the first."""
    if request.param == "real":
        yield torch.device("cuda", 0)
        return
    with emulated_cuda(num_cards=2) as machine:
        yield torch.device("cuda", 1)
    assert machine.contexts <= {1}, "memory of another card was taken"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For what is emulated."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
