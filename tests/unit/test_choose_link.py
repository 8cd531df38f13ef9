"""Which link two stages use, as a table."""

from __future__ import annotations

import pytest

from asyncpipe.errors import Invalid
from asyncpipe_workers.links import LinkKind, Seat, choose_link, offered_here

CPU = Seat("a", "cpu")
CARD_0 = Seat("a", "cuda:0", "GPU-0")
CARD_1 = Seat("a", "cuda:1", "GPU-1")
ALL = frozenset(LinkKind)
NO_NCCL = ALL - {LinkKind.NCCL}


@pytest.mark.parametrize(
    ("wanted", "first", "second", "offered", "expected"),
    [
        ("auto", CPU, CPU, ALL, LinkKind.ZMQ),
        ("auto", CPU, Seat("b", "cpu"), ALL, LinkKind.ZMQ),
        ("auto", CARD_0, CPU, ALL, LinkKind.ZMQ),
        ("auto", CPU, CARD_0, ALL, LinkKind.ZMQ),
        ("auto", CARD_0, CARD_1, ALL, LinkKind.NCCL),
        ("auto", CARD_0, Seat("b", "cuda:0", "GPU-2"), ALL, LinkKind.NCCL),
        ("auto", CARD_0, CARD_1, NO_NCCL, LinkKind.ZMQ),
        ("auto", CARD_0, CARD_0, ALL, LinkKind.ZMQ),
        ("auto", CARD_0, Seat("container", "cuda:0", "GPU-0"), ALL, LinkKind.ZMQ),  # one card, seen by two containers
        ("auto", CARD_0, Seat("a", "cuda:0", "GPU-1"), ALL, LinkKind.NCCL),  # each process sees a card of its own
        ("auto", Seat("a", "cuda:0"), Seat("a", "cuda"), ALL, LinkKind.ZMQ),  # cards unknown: the same number on the same host
        ("auto", Seat("a", "cuda:0"), Seat("a", "cuda:1"), ALL, LinkKind.NCCL),
        ("auto", Seat("a", "cuda:0"), Seat("b", "cuda:0"), ALL, LinkKind.NCCL),
        ("zmq", CARD_0, CARD_1, ALL, LinkKind.ZMQ),
        ("zmq", CPU, CPU, frozenset(), LinkKind.ZMQ),
        ("gloo", CPU, CPU, ALL, LinkKind.GLOO),
        ("gloo", CPU, Seat("b", "cpu"), ALL, LinkKind.GLOO),
        ("nccl", CARD_0, CARD_1, ALL, LinkKind.NCCL),
    ],
)
def test_a_wish_becomes_a_link(
    wanted: str, first: Seat, second: Seat, offered: frozenset[LinkKind], expected: LinkKind
) -> None:
    assert choose_link(wanted, seats=(first, second), offered=offered) is expected


@pytest.mark.parametrize(
    ("wanted", "first", "second", "offered", "message"),
    [
        ("nccl", CPU, CPU, ALL, "no nccl link from cpu to cpu: nccl carries tensors of cuda devices, not of cpu"),
        ("nccl", CARD_0, CPU, ALL, "no nccl link from cuda:0 to cpu: nccl carries tensors of cuda devices, not of cpu"),
        ("nccl", CARD_0, CARD_1, NO_NCCL, "no nccl link from cuda:0 to cuda:1: torch has no nccl on one of them"),
        (
            "nccl",
            CARD_0,
            CARD_0,
            ALL,
            "no nccl link from cuda:0 to cuda:0: both stages are on one card, which nccl does not allow",
        ),
        ("gloo", CARD_0, CARD_1, ALL, "no gloo link from cuda:0 to cuda:1: gloo carries tensors of cpu devices, not of cuda:0"),
        ("gloo", CPU, CPU, frozenset({LinkKind.ZMQ}), "no gloo link from cpu to cpu: torch has no gloo on one of them"),
        ("rdma", CPU, CPU, ALL, "there is no link 'rdma': choose one of auto, zmq, gloo, nccl"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    wanted: str, first: Seat, second: Seat, offered: frozenset[LinkKind], message: str
) -> None:
    with pytest.raises(Invalid) as refused:
        choose_link(wanted, seats=(first, second), offered=offered)
    assert str(refused.value) == message


def test_torch_offers_gloo_wherever_it_has_distributed() -> None:
    assert {LinkKind.ZMQ, LinkKind.GLOO} <= offered_here()
