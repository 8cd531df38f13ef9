"""Who answers when ZeroMQ asks whether a key may come in (its RFC 27, ZAP).

There is one address for that question in a process, so all CURVE listeners share one handler: pyzmq's, in a thread of its
own, since listeners may belong to different event loops. It runs while there is such a listener, and not longer.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.auth.base import Authenticator
from zmq.auth.thread import ThreadAuthenticator

from asyncpipe.transport.zmq_socket import context

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ADDRESS_FRAME = 3  # of a request: where the connection comes from

Judge = Callable[[str, str], bool]  # (public key, IP address) -> may it come in? Called in the handler's thread


class ZapHandler:
    """Use `zap_handler()`: there can be only one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._authenticator: _Authenticator | None = None

    def join(self, judge: Judge) -> str:
        """A new ZAP domain: for each key that connects to a listener of that domain, `judge` is asked."""
        with self._lock:
            domain = f"asyncpipe-{next(self._numbers)}"
            authenticator = self._authenticator or _started()
            authenticator.configure_curve_callback(domain, _Provider(judge, authenticator))
            self._authenticator = authenticator
            return domain

    def leave(self, domain: str) -> None:
        """No key may come in there any more."""
        with self._lock:
            if self._authenticator is not None:
                self._authenticator.credentials_providers.pop(domain, None)
                if not self._authenticator.credentials_providers:
                    self._stop()

    def leave_all(self, *, pid: int) -> None:
        """At the end of process `pid`, for listeners that nobody closed: ZeroMQ must not end under a running thread."""
        with self._lock:
            if pid == os.getpid():
                self._stop()

    def _stop(self) -> None:
        authenticator, self._authenticator = self._authenticator, None
        if authenticator is not None:
            authenticator.stop()


def zap_handler() -> ZapHandler:
    return _handler_of(os.getpid())


@functools.cache
def _handler_of(pid: int) -> ZapHandler:
    """Keyed by process, as its context is."""
    context()  # registers its own end before, and so comes after
    handler = ZapHandler()
    atexit.register(handler.leave_all, pid=pid)
    return handler


class _Unbinding(Authenticator):
    """Closing a socket gives its address back some time later, when the next handler may want it; unbinding does at once."""

    def stop(self) -> None:
        if self.zap_socket:
            with contextlib.suppress(zmq.ZMQError):  # it could not be bound, which is why we stop
                self.zap_socket.unbind(ZAP_ADDRESS)
        super().stop()


class _Authenticator(ThreadAuthenticator, _Unbinding):
    """Also remembers where the request at hand comes from, which pyzmq does not tell its callbacks."""

    remote_address = ""

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        self.remote_address = msg[ADDRESS_FRAME].decode(errors="replace") if len(msg) > ADDRESS_FRAME else ""
        await super().handle_zap_message(msg)


def _started() -> _Authenticator:
    authenticator = _Authenticator(context())
    try:
        authenticator.start()
    except BaseException:
        authenticator.stop()
        raise
    return authenticator


@dataclass(frozen=True, slots=True)
class _Provider:
    """A `credentials_provider` in pyzmq's sense."""

    judge: Judge
    authenticator: _Authenticator

    def callback(self, domain: str, key: bytes) -> bool:
        return self.judge(key.decode("ascii"), self.authenticator.remote_address)
