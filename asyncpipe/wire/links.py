"""How two neighbouring stages agree on a link for hidden states beside their messages."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from asyncpipe.wire.fields import Count, Message, Name, Request
from asyncpipe.wire.tensors import MAX_DIM, MAX_RANK, DType


class LinkKind(enum.StrEnum):
    ZMQ = "zmq"  # in the messages themselves: no tensor link
    GLOO = "gloo"
    NCCL = "nccl"


LINK_WISHES = ("auto", *LinkKind)


class LinkOffer(msgspec.Struct, frozen=True, kw_only=True):
    """receiving stage -> sending stage: where to meet for a link. Who knows `token` may be the other end."""

    kind: LinkKind
    host_ip: Annotated[str, Meta(min_length=1, max_length=64)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    epoch: Count
    token: Annotated[str, Meta(min_length=16, max_length=64)]


class LinkHosted(Message, frozen=True, kw_only=True):
    """receiving stage -> sending stage, the answer to `HostLink`: no offer where hidden states are to travel in the messages,
    and why, if something else was asked for."""

    offer: LinkOffer | None = None
    obstacle: Name = ""


class HostLink(Request[LinkHosted], frozen=True, kw_only=True):
    """sending stage -> receiving stage, once an epoch: make a link as `wanted`, for what the sender is and has."""

    epoch: Count
    wanted: Name
    machine: Name
    device: Name
    card: Name = ""
    offered: Annotated[tuple[LinkKind, ...], Meta(max_length=8)] = ()


class Posted(msgspec.Struct, frozen=True, array_like=True):
    """Hidden states that travel over the link, under `tag`, instead of in the message."""

    tag: Count
    dtype: DType
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_DIM)], ...], Meta(max_length=MAX_RANK)]
