"""How the two ends of a link meet: the receiver hosts a store on one named interface, and offers it; the sender joins.

    hosting = await host(LinkKind.GLOO, address_ip="10.0.0.7", epoch=3, peer="stage 0")
    ...                                     # hosting.offer travels to the sender
    link = await hosting.joined()           # beside the sender's `await join(offer, peer="stage 1")`

Stores and process groups are torch's. Neither encrypts, and only the offer's token keeps strangers out: links are for networks
whose members are trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from asyncpipe.errors import AsyncPipeError, Broken, Closed, Invalid, Timeout
from asyncpipe_workers.links import gloo, nccl
from asyncpipe_workers.links.base import MAX_IN_FLIGHT, TIMEOUT_S, LinkKind, LinkOffer, TensorLink
from asyncpipe_workers.links.group_link import End, Group, GroupLink, LinkSettings, reason
from asyncpipe_workers.links.threads import Threads

CPU = torch.device("cpu")
OTHER_STAGE = "the other stage"
SPARE_S = 5.0  # by how much the library's deadlines are later than ours: it reports them with stack traces

_CAME_KEY = "came"
_SENDER, _NOBODY = "sender", "nobody"


@dataclass(frozen=True, slots=True)
class _Backend:
    check: Callable[[torch.device], None]  # raises Invalid for a device that it does not serve
    connect: Callable[[Store, LinkSettings], Group]  # blocks; raises RuntimeError
    link: Callable[[Group, Threads, LinkSettings], TensorLink]


_BACKENDS = {
    LinkKind.GLOO: _Backend(gloo.check, gloo.connect, GroupLink),
    LinkKind.NCCL: _Backend(nccl.check, nccl.connect, nccl.NcclLink),
}


class Hosting:
    """Where a receiver waits for its sender, listening since it was made. Take the link by `joined`, or `close` it."""

    def __init__(self, store: TCPStore, threads: Threads, settings: LinkSettings, *, kind: LinkKind, epoch: int) -> None:
        token = secrets.token_hex(16)
        self.offer = LinkOffer(kind=kind, host_ip=settings.own_ip, port=store.port, epoch=epoch, token=token)
        self._store: TCPStore | None = store
        self._threads = threads
        self._settings = settings
        self._released: asyncio.Future[None] | None = None

    async def joined(self) -> TensorLink:
        """The receiver's end, once the sender has joined.

        Raises Timeout when it does not in the link's time, and Broken when it is lost on the way; then, and when it is
        cancelled, the hosting is closed.
        """
        try:
            async with _deadline(self._settings, doing="join"):
                group = await self._threads.run(self._meet)
        except BaseException:
            self._release()
            raise
        self._store = None  # the group's now
        return _BACKENDS[self.offer.kind].link(group, self._threads, self._settings)

    async def close(self) -> None:
        """Stop listening; returns when nothing is left. Idempotent. A link that was taken is closed by itself."""
        self._release()
        if self._released is not None:
            await asyncio.shield(self._released)

    def _meet(self) -> Group:
        if self._store is None:
            raise Invalid("this hosting was joined or closed before")
        meeting = _meeting(self._store, self.offer)
        if meeting.get(_CAME_KEY) != _SENDER.encode():
            raise Closed(f"{self._settings.peer} is not awaited any more")
        return _BACKENDS[self.offer.kind].connect(meeting, self._settings)

    def _release(self) -> None:
        if self._store is not None and self._released is None:
            self._released = self._threads.release(stop=self._stop_waiting, drop=self._drop)

    def _stop_waiting(self) -> None:
        with contextlib.suppress(RuntimeError):
            _meeting(_client(self.offer, timeout_s=SPARE_S), self.offer).set(_CAME_KEY, _NOBODY)

    def _drop(self) -> None:
        self._store = None


async def host(
    kind: LinkKind,
    *,
    address_ip: str,
    epoch: int,
    peer: str = OTHER_STAGE,
    device: torch.device = CPU,
    timeout_s: float = TIMEOUT_S,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> Hosting:
    """For the receiver: listen on `address_ip`, on a port that the system chooses.

    `peer` names the sender in errors; `timeout_s` is the deadline of the joining and of every transfer. `max_in_flight` is to
    be well above the sender's: what is sent for one end may still be arriving for the other. Raises Invalid.
    """
    settings = LinkSettings(End.RECEIVER, _named(address_ip), peer, device, timeout_s, max_in_flight)
    _check(kind, settings)
    threads = Threads("link")
    try:
        store = await threads.run(partial(_listen, address_ip, timeout_s))
    except BaseException:
        threads.release()
        raise
    return Hosting(store, threads, settings, kind=kind, epoch=epoch)


async def join(
    offer: LinkOffer,
    *,
    peer: str = OTHER_STAGE,
    device: torch.device = CPU,
    timeout_s: float = TIMEOUT_S,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> TensorLink:
    """The sender's end. Gloo listens on the address by which this machine reaches the host, and on no other.

    Raises Invalid, Timeout, and Broken when nobody listens there or the receiver is lost on the way. A thread that was left
    waiting, because this was late or cancelled, ends by itself soon after the deadline.
    """
    settings = LinkSettings(End.SENDER, "", peer, device, timeout_s, max_in_flight)
    _check(offer.kind, settings)
    threads = Threads("link")
    try:
        async with _deadline(settings, doing="answer"):
            settings = settings.at(await _own_ip(offer))
            group = await threads.run(partial(_join, offer, settings))
    except BaseException:
        threads.release()
        raise
    return _BACKENDS[offer.kind].link(group, threads, settings)


def _check(kind: LinkKind, settings: LinkSettings) -> None:
    if kind not in _BACKENDS:
        raise Invalid(f"{kind} needs no link: its tensors travel in the messages")
    if settings.timeout_s <= 0 or settings.max_in_flight < 1:
        raise Invalid(f"a link needs time and room: timeout_s={settings.timeout_s:g}, max_in_flight={settings.max_in_flight}")
    _BACKENDS[kind].check(settings.device)


def _named(address_ip: str) -> str:
    try:
        address = ipaddress.ip_address(address_ip)
    except ValueError:
        raise Invalid(f"a link is hosted on the IP address of an interface, not on {address_ip!r}") from None
    if address.is_unspecified:
        raise Invalid(f"a link is hosted on one interface; {address_ip} is all of them")
    return address_ip


@contextlib.asynccontextmanager
async def _deadline(settings: LinkSettings, *, doing: str) -> AsyncIterator[None]:
    """What the library raises becomes one of ours, without its frames, which hold on to sockets."""
    failure: AsyncPipeError | None = None
    try:
        async with asyncio.timeout(settings.timeout_s):
            yield
    except TimeoutError:
        failure = Timeout(f"{settings.peer} did not {doing} within {settings.timeout_s:g} s")
    except (OSError, RuntimeError) as error:
        failure = Broken(f"{settings.peer} could not be met: {reason(error)}")
    if failure is not None:
        raise failure


def _listen(address_ip: str, timeout_s: float) -> TCPStore:
    """torch would listen on all interfaces, were it not given a socket."""
    family = socket.AF_INET6 if ":" in address_ip else socket.AF_INET
    with socket.socket(family) as listener:
        try:
            listener.bind((address_ip, 0))
        except OSError as error:
            raise Invalid(f"cannot listen on {address_ip}: {error.strerror}") from None
        return TCPStore(
            address_ip,
            listener.getsockname()[1],
            is_master=True,
            timeout=timedelta(seconds=timeout_s + SPARE_S),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store's from now on
        )


def _client(offer: LinkOffer, *, timeout_s: float) -> TCPStore:
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(offer.host_ip, offer.port, is_master=False, timeout=timeout, wait_for_workers=False)


def _meeting(store: TCPStore, offer: LinkOffer) -> PrefixStore:
    return PrefixStore(f"asyncpipe/{offer.epoch}/{offer.token}", store)


def _join(offer: LinkOffer, settings: LinkSettings) -> Group:
    meeting = _meeting(_client(offer, timeout_s=settings.timeout_s + SPARE_S), offer)
    meeting.set(_CAME_KEY, _SENDER)
    return _BACKENDS[offer.kind].connect(meeting, settings)


async def _own_ip(offer: LinkOffer) -> str:
    """The address by which this machine reaches the host; an OSError at once when nobody listens there."""
    _, writer = await asyncio.open_connection(offer.host_ip, offer.port)
    try:
        own_ip: str = writer.get_extra_info("sockname")[0]
        return own_ip
    finally:
        writer.close()
        await writer.wait_closed()
