"""An actor system: one per process, owner of every task, actor, link and child process in it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple, Self

from asyncpipe.actors.actor import Down
from asyncpipe.actors.cell import Cell, Factory, Life, Sleep
from asyncpipe.actors.mailbox import MailboxStatistics
from asyncpipe.actors.nursery import NURSERY_ACTOR, ChildActors
from asyncpipe.actors.ref import ActorRef
from asyncpipe.actors.routes import LocalRoute, Peer
from asyncpipe.actors.supervisor import RestartPolicy
from asyncpipe.clock import Clock, MonotonicClock
from asyncpipe.errors import AsyncPipeError, Closed, Invalid, Refused, to_data
from asyncpipe.ids import MAX_ID_CHARS, ActorName, NodeId, new_node_id
from asyncpipe.transport.base import Link, LinkOptions, LinkStatistics, Listener
from asyncpipe.transport.registry import transport_for
from asyncpipe.wire.handshake import Hello

STOP_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


class Destination(NamedTuple):
    """Where to connect, and whom to expect there."""

    address: str
    server_key: str | None


@dataclass(frozen=True, slots=True)
class SystemStatistics:
    mailboxes: dict[str, MailboxStatistics]
    links: dict[NodeId, LinkStatistics]
    num_tasks: int


class ActorSystem:
    """Use as `async with ActorSystem("name") as system`. Leaving the block stops everything that was started in it.

    `token` is asked of every peer that connects, unless `listen` says otherwise, and shown to every peer connected to.
    With `options.keys`, peers over tcp prove who they are as well, and may only be what their keys are allowed to be.
    `clock` and `sleep` time the restarts of crashed actors; tests replace them.
    """

    def __init__(
        self,
        name: str = "asyncpipe",
        *,
        role: str = "actor",
        token: str = "",
        options: LinkOptions = LinkOptions(),  # noqa: B008 - frozen
        clock: Clock | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.name = name
        self.role = role
        self.node: NodeId = new_node_id()
        self._options = options
        self._hello = Hello(
            node=self.node, role=role, token=token, window=options.window, max_frame_bytes=options.max_frame_bytes
        )
        self._clock = clock or MonotonicClock()
        self._sleep = sleep
        self._group = asyncio.TaskGroup()
        self._local = LocalRoute(self)
        self._cells: dict[ActorName, Cell] = {}
        self._peers: list[Peer] = []
        self._connected: dict[Destination, Peer] = {}
        self._connecting: dict[Destination, asyncio.Lock] = {}
        self._listeners: list[Listener] = []
        self._watchers: dict[ActorRef, set[ActorRef]] = {}
        self._children: ChildActors | None = None
        self._is_open = False
        self._is_stopping = False

    # --- life ---

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._is_open = True
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._shut_down()
        finally:
            self._is_open = False
            for cell in self._cells.values():
                if cell.task is not None:
                    cell.task.cancel()
            # A TaskGroup wraps the body's exception in a group of its own; only a cancellation is its business.
            cancelled = error if isinstance(error, asyncio.CancelledError) else None
            try:
                await self._group.__aexit__(type(cancelled) if cancelled else None, cancelled, None)
            except BaseExceptionGroup as group:
                if len(group.exceptions) == 1:
                    raise group.exceptions[0] from None
                raise

    async def _shut_down(self) -> None:
        """Actors first, so that their last words still travel; then children, links and listeners."""
        self._is_stopping = True
        running = [cell for cell in self._cells.values() if cell.life is not Life.STOPPED]
        for cell in running:
            with contextlib.suppress(AsyncPipeError):
                cell.request_stop()
        if running:
            await asyncio.wait({cell.ended for cell in running}, timeout=STOP_TIMEOUT_S)
        if self._children is not None:
            await self._children.stop()
        for peer in list(self._peers):
            await peer.link.close()
        for listener in self._listeners:
            await listener.close()

    # --- actors ---

    def spawn(self, factory: Factory, *, name: str, restart: RestartPolicy = RestartPolicy()) -> ActorRef:  # noqa: B008
        """Start an actor. Raises Invalid for a name in use, Closed when the system is not running."""
        self._check_open()
        actor_name = ActorName(name)
        if not 0 < len(name) <= MAX_ID_CHARS:
            raise Invalid(f"an actor's name has 1 to {MAX_ID_CHARS} characters")
        if actor_name in self._cells:
            raise Invalid(f"an actor named {name!r} is running already")
        ref = ActorRef(actor_name, self._local)
        cell = Cell(factory, ref=ref, system=self, policy=restart, clock=self._clock, sleep=self._sleep)
        self._cells[actor_name] = cell
        cell.task = self._group.create_task(cell.run(), name=f"actor {name}")
        cell.ended.add_done_callback(lambda ended: self._on_end(cell, ended.result()))
        return ref

    async def stop(self, ref: ActorRef, *, timeout: float = STOP_TIMEOUT_S) -> None:
        """Ask a local actor to stop after its message at hand; cancel it when it has not within `timeout` seconds."""
        cell = self._cells.get(ref.name) if ref.node == self.node else None
        if cell is None:
            return
        cell.request_stop()
        await asyncio.wait({cell.ended}, timeout=timeout)
        if cell.task is not None and not cell.ended.done():
            log.warning("actor %s did not stop within %g s; cancelling it", ref.name, timeout)
            cell.task.cancel()
            await asyncio.wait({cell.ended}, timeout=timeout)

    def run_beside(self, ref: ActorRef, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """See `Actor.background`."""
        return self.cell(ref.name).run_beside(coroutine, lambda guarded: self._group.create_task(guarded, name=name))

    def cell(self, name: ActorName) -> Cell:
        """For routes. Raises Refused for an actor that does not run here, Closed when none do any more."""
        cell = self._cells.get(name)
        if cell is None:
            if self._is_stopping:
                raise Closed(f"{self.name} is stopping")
            raise Refused(f"no actor named {name!r} runs in {self.name}")
        return cell

    # --- other systems ---

    async def listen(self, address: str, *, token: str | None = None) -> str:
        """Take connections at `address`; returns it as peers would write it, with the real port.

        `token` replaces the system's own for this address ("" asks for none). Raises Invalid.
        """
        self._check_open()
        hello = self._hello if token is None else replace(self._hello, token=token)
        listener = await transport_for(address).listen(address, hello=hello, on_link=self._on_link, options=self._options)
        self._listeners.append(listener)
        return listener.address

    async def connect(self, address: str, *, actor: str, timeout: float = 5.0, server_key: str | None = None) -> ActorRef:
        """A reference to the actor named `actor` in the system that listens at `address`; links are shared.

        With keys, over tcp, `server_key` is the public key that this system must have; None: our coordinator's. Raises
        Timeout when nobody answers there, Refused, Invalid.
        """
        self._check_open()
        destination = Destination(address, server_key)
        async with self._connecting.setdefault(destination, asyncio.Lock()):
            peer = self._connected.get(destination)
            if peer is None or not peer.link.is_open:
                options = replace(self._options, handshake_s=timeout, server_key=server_key)
                link = await transport_for(address).connect(address, hello=self._hello, options=options)
                peer = self._connected[destination] = self._add_peer(link)
        return peer.ref(actor)

    async def spawn_process(self, target: str, *, name: str, timeout: float = 30.0) -> ActorRef:
        """Start a child process that runs the actor class "package.module:Class" as `name`; returns the reference to it.

        The child dies with this process, and is stopped with this system. Watchers hear how it ended and its last lines of
        standard error. Raises Timeout, and Broken when it ends before it is up.
        """
        self._check_open()
        if self._children is None:
            self._children = children = ChildActors(token=self._hello.token or secrets.token_hex(16))
            self.spawn(lambda: children, name=NURSERY_ACTOR)
            children.address = await self.listen(f"ipc://@asyncpipe-{secrets.token_hex(8)}", token=children.token)
        return await self._children.start(
            [sys.executable, "-m", "asyncpipe.actors.child", target, name], name=name, timeout_s=timeout
        )

    def reaches(self, ref: ActorRef) -> bool:
        """Whether there is still a link to where the actor was; of local ones, whether it runs."""
        if ref.node == self.node:
            return ref.name in self._cells
        return any(peer.node == ref.node and peer.link.is_open for peer in self._peers)

    def lose(self, node: NodeId, error: AsyncPipeError) -> None:
        """End the links to `node` with `error`: its process is known to be gone."""
        for peer in [peer for peer in self._peers if peer.node == node]:
            peer.link.abort(error)

    # --- monitors ---

    def monitor(self, target: ActorRef, *, watcher: ActorRef) -> None:
        """`watcher`, an actor here, is signalled `Down` once when `target` ends, at once when it has ended already."""
        if target.node == self.node:
            self.watch_for(watcher, target.name)
            return
        self._watchers.setdefault(target, set()).add(watcher)
        peer = target.route
        try:
            if not isinstance(peer, Peer):
                raise Refused(f"{target} cannot be watched")
            peer.watch(target, watcher)
        except AsyncPipeError as error:
            self._announce(target, error)

    def watch_for(self, watcher: ActorRef, name: ActorName) -> None:
        """Watch one of our actors, for an actor anywhere."""
        target = ActorRef(name, self._local)
        self._watchers.setdefault(target, set()).add(watcher)
        if name not in self._cells:
            self._announce(target, Closed(f"no actor named {name!r} runs in {self.name}"))

    def on_remote_down(self, target: ActorRef, watcher_name: str, error: AsyncPipeError) -> None:
        watchers = self._watchers.get(target, set())
        for watcher in [watcher for watcher in watchers if watcher.name == watcher_name]:
            watchers.discard(watcher)
            self._tell_down(watcher, target, error)

    def statistics(self) -> SystemStatistics:
        """Every mailbox and link, now."""
        return SystemStatistics(
            mailboxes={name: cell.mailbox.statistics() for name, cell in self._cells.items()},
            links={peer.node: peer.link.statistics() for peer in self._peers},
            num_tasks=sum(1 for cell in self._cells.values() if cell.life is not Life.STOPPED),
        )

    # --- inside ---

    def _check_open(self) -> None:
        if not self._is_open:
            raise Closed(f"actor system {self.name} is not running; use it in `async with`")

    def _on_link(self, link: Link) -> None:
        self._add_peer(link)

    def _add_peer(self, link: Link) -> Peer:
        peer = Peer(self, link, self._on_peer_lost)
        self._peers.append(peer)
        link.start(peer)
        return peer

    def _on_peer_lost(self, peer: Peer, error: AsyncPipeError) -> None:
        self._peers.remove(peer)
        for target in [target for target in self._watchers if target.route is peer]:
            self._announce(target, error)
        for watchers in self._watchers.values():
            watchers -= {watcher for watcher in watchers if watcher.route is peer}

    def _on_end(self, cell: Cell, error: AsyncPipeError) -> None:
        del self._cells[cell.ref.name]
        self._announce(cell.ref, error)

    def _announce(self, target: ActorRef, error: AsyncPipeError) -> None:
        for watcher in self._watchers.pop(target, set()):
            self._tell_down(watcher, target, error)

    def _tell_down(self, watcher: ActorRef, target: ActorRef, error: AsyncPipeError) -> None:
        try:
            if isinstance(watcher.route, Peer):
                watcher.route.send_down(target, watcher, error)
            else:
                watcher.signal(Down(target, to_data(error)))
        except AsyncPipeError as lost:
            log.info("%s does not hear that %s has ended: %s", watcher, target, lost)
