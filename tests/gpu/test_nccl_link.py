"""Tensor links over NCCL on the card. Both ends share it: NCCL takes two processes for two hosts when told so."""

from __future__ import annotations

import pytest
import torch

from asyncpipe_workers.links import LinkKind
from asyncpipe_workers.links.nccl import NcclLink
from tests.contract.link_peers import Table, child, meet, numbers, perform_with_child
from tests.support import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
    pytest.mark.filterwarnings("ignore:An unbatched P2P op"),
]
TABLE = Table(LinkKind.NCCL, "cuda:0", timeout_s=30.0)
OTHER_HOST = {"NCCL_HOSTID": "child"}
needs_nccl = pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="this build of torch has no NCCL")


@pytest.fixture(autouse=True)
def _two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_HOSTID", "parent")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")


@needs_nccl
@pytest.mark.parametrize("child_end", ["sender", "receiver"])
@pytest.mark.parametrize("play", ["many kinds", "at once", "sent ahead", "cancelled"])
def test_what_holds_for_every_link_but_for_the_order_of_tags(play: str, child_end: str) -> None:
    run(perform_with_child(play, child_end, TABLE, OTHER_HOST), timeout_s=90)


@needs_nccl
def test_a_tensor_that_does_not_come_ends_the_link() -> None:
    run(perform_with_child("not sent", "sender", Table(LinkKind.NCCL, "cuda:0", timeout_s=10.0), OTHER_HOST), timeout_s=90)


@needs_nccl
def test_closing_aborts_what_is_under_way() -> None:
    run(perform_with_child("receiver closes", "sender", TABLE, OTHER_HOST), timeout_s=90)


@needs_nccl
def test_computation_may_be_queued_before_its_input_is_there() -> None:
    async def scenario() -> None:
        async with child("many kinds", "sender", TABLE, OTHER_HOST) as (_, words):
            link = await meet("receiver", words, TABLE)
            assert isinstance(link, NcclLink)
            ahead = link.recv_ahead(0, shape=(3, 5), dtype=torch.float32)
            doubled = ahead.on_stream() * 2
            assert torch.equal((await ahead.arrived).cpu(), numbers(3, 5))
            assert torch.equal(doubled.cpu(), numbers(3, 5) * 2)
            await link.close()

    run(scenario(), timeout_s=90)
