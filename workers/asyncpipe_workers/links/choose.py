"""Which link two neighbouring stages use: a decision without side effects."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.distributed

from asyncpipe.errors import Invalid
from asyncpipe_workers.links.base import LinkKind

LinkWish = Literal["auto", "zmq", "gloo", "nccl"]


class Seat(NamedTuple):
    """Where a stage computes."""

    host: str
    device: str  # cpu, cuda:1
    card: str = ""  # the GPU's UUID: device numbers repeat where processes see different cards


def choose_link(wanted: LinkWish | str, *, seats: tuple[Seat, Seat], offered: frozenset[LinkKind]) -> LinkKind:
    """For the link between `seats`; `offered` is what torch offers on both of them.

    auto is nccl between different cards, and zmq otherwise: on one machine it passes through shared memory, which Gloo does
    not. Raises Invalid for a wish that cannot be met, with a line that says why.
    """
    if wanted == "auto":
        return LinkKind.NCCL if _obstacle(LinkKind.NCCL, seats, offered) is None else LinkKind.ZMQ
    try:
        kind = LinkKind(wanted)
    except ValueError:
        raise Invalid(f"there is no link {wanted!r}: choose one of auto, {', '.join(LinkKind)}") from None
    obstacle = _obstacle(kind, seats, offered)
    if obstacle is not None:
        raise Invalid(f"no {kind} link from {seats[0].device} to {seats[1].device}: {obstacle}")
    return kind


def offered_here() -> frozenset[LinkKind]:
    """What this process's torch offers."""
    kinds = {LinkKind.ZMQ}
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        kinds.add(LinkKind.GLOO)
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        kinds.add(LinkKind.NCCL)
    return frozenset(kinds)


def _obstacle(kind: LinkKind, seats: tuple[Seat, Seat], offered: frozenset[LinkKind]) -> str | None:
    if kind is LinkKind.ZMQ:
        return None
    needed = "cuda" if kind is LinkKind.NCCL else "cpu"
    strangers = [seat.device for seat in seats if seat.device.partition(":")[0] != needed]
    if strangers:
        return f"{kind} carries tensors of {needed} devices, not of {strangers[0]}"
    if kind not in offered:
        return f"torch has no {kind} on one of them"
    if kind is LinkKind.NCCL and _is_one_card(*seats):
        return "both stages are on one card, which nccl does not allow"
    return None


def _is_one_card(first: Seat, second: Seat) -> bool:
    if first.card and second.card:
        return first.card == second.card
    return first.host == second.host and _index(first) == _index(second)


def _index(seat: Seat) -> str:
    return seat.device.partition(":")[2] or "0"
