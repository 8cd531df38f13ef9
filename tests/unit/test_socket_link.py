"""A link whose peer has left: what it said last still counts."""

from __future__ import annotations

from collections.abc import Sequence

from asyncpipe.errors import AsyncPipeError, Broken
from asyncpipe.ids import NodeId
from asyncpipe.transport.base import Delivery, Lane, Link, LinkOptions
from asyncpipe.transport.credit import Kind
from asyncpipe.transport.socket_link import HEADER, SocketLink
from asyncpipe.wire.handshake import Hello
from asyncpipe.wire.tensors import Buffer
from tests.support import run, until


class Witness:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_delivery(self, link: Link, delivery: Delivery) -> None:
        assert delivery.lane is Lane.DATA
        self.seen.append(bytes(delivery.frames[0]))

    def on_lost(self, link: Link, error: AsyncPipeError) -> None:
        self.seen.append(str(error))


def test_what_a_peer_said_before_it_left_is_delivered_though_it_cannot_be_answered() -> None:
    async def scenario() -> list[object]:
        unread = [(Kind.DATA, [b"last words"]), (Kind.BYE, [])]

        def out(parts: Sequence[Buffer]) -> None:
            raise Broken("the peer is gone: no route to host")

        def receive_all() -> None:
            while unread:
                kind, frames = unread.pop(0)
                link.on_message(HEADER.pack(kind, 0), frames)

        link = SocketLink(
            local=Hello(NodeId("here"), "actor"),
            remote=Hello(NodeId("there"), "actor"),
            options=LinkOptions(),
            out=out,
            receive_all=receive_all,
            forget=lambda: None,
        )
        link._owe(Kind.SHARED, 1)
        witness = Witness()
        link.start(witness)
        await until(lambda: len(witness.seen) > 1)
        return witness.seen

    assert run(scenario()) == [b"last words", "actor there closed the link"]
