"""CURVE (ZeroMQ's RFC 26) on both ends of a tcp connection, and words for handshakes that fail.

A listener has one key, which connectors must know before, and lets in the keys that its `Keys` allow, each in its roles. That
is decided twice: by key when ZeroMQ asks (`zap`), and by key and role when the peer says Hello. Everything after the keys
were exchanged is encrypted with keys made for this connection, so that a recording can be neither read nor sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from asyncpipe.errors import Invalid, Refused
from asyncpipe.transport.base import LinkOptions
from asyncpipe.transport.key_pair import KeyPair, check_public_key
from asyncpipe.transport.keys import Keys
from asyncpipe.transport.zap import zap_handler
from asyncpipe.transport.zmq_socket import Monitor

CURVE_BYTES = 33  # by which encryption makes a frame longer: a name, a nonce, flags, an authenticator
MAX_CUT_HANDSHAKES = 20  # over a second or so; a proxy whose listener is not there yet cuts connections off as well
CUT = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
HANDSHAKE_FAILED = CUT | int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)

OnRefused = Callable[[str], None]


def keys_for(address: str, options: LinkOptions) -> Keys | None:
    """The keys that both ends of a link at `address` use; None where links are plain."""
    return options.keys if address.startswith("tcp://") else None


# --- the listener's end -----------------------------------------------------------------------------------------------


class Gate:
    """At one listener: lets in the keys that are allowed, and tells `on_refused`, in the loop, of all others."""

    def __init__(self, socket: zmq.Socket[bytes], keys: Keys, on_refused: OnRefused) -> None:
        """To be made before `socket` is bound: a listener must at no time let in everybody."""
        self._keys = keys
        self._on_refused = on_refused
        self._loop = asyncio.get_running_loop()
        self._domain = zap_handler().join(self._may_come_in)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret.encode())
        socket.setsockopt_string(zmq.ZAP_DOMAIN, self._domain)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a handler nobody comes in, rather than everybody
        self._monitor = Monitor(socket, CUT, self._on_event)

    def roles_of(self, key: str) -> frozenset[str]:
        return self._keys.roles_of(key)

    def close(self) -> None:
        """To be called before the socket is closed, as its monitor asks for."""
        self._monitor.close()
        zap_handler().leave(self._domain)

    def _may_come_in(self, key: str, ip_address: str) -> bool:
        """Called in the thread of the ZAP handler."""
        is_allowed = bool(self._keys.roles_of(key))
        if not is_allowed:
            with contextlib.suppress(RuntimeError):  # the loop was closed with the listener still open
                self._loop.call_soon_threadsafe(self._on_refused, f"{ip_address} has the key {key}, which is not allowed here")
        return is_allowed

    def _on_event(self, event: int, detail: int) -> None:
        self._on_refused(_listeners_words(event, detail))


def _listeners_words(event: int, detail: int) -> str:
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or detail == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return "it has no key, or left or fell silent before it had shown one"  # whoever sees first that keys are asked for
    if detail == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
        return "it does not know this listener's key"
    return f"its handshake is not CURVE's, or repeats another one (ZeroMQ's error {detail:#x})"


# --- the connector's end ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CurveClient:
    """Who we are at a listener, and the public key that it must have."""

    own: KeyPair
    listener: str

    def prepare(self, socket: zmq.Socket[bytes]) -> None:
        """Before `socket` is connected."""
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.own.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.own.secret.encode())
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.listener.encode())


def curve_client(address: str, options: LinkOptions) -> CurveClient | None:
    """None where links are plain. Raises Invalid when just one of the two keys is there."""
    if not address.startswith("tcp://"):
        return None
    if options.keys is None:
        if options.server_key is not None:
            raise Invalid(f"a key was given for {address}, which is of no use without keys of our own")
        return None
    listener = options.server_key or options.keys.coordinator
    if listener is None:
        raise Invalid(f"the public key of the listener at {address} is not known: give it as server_key")
    return CurveClient(options.keys.own, check_public_key(listener, source=f"the key given for {address}"))


class FailedHandshakes:
    """Of one connector: what ZeroMQ's monitor tells of them, and when to give up."""

    def __init__(self, address: str, client: CurveClient | None) -> None:
        self._address = address
        self._client = client
        self._num_cut = 0

    def error(self, event: int, detail: int) -> Refused | None:
        """Why no further attempt can succeed, if so."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            own = "" if self._client is None else f" {self._client.own.public}"
            return Refused(f"{self._address} refused our key{own}: it is not allowed there")
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and detail == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return Refused(f"{self._address} {self._mismatch()}")
        self._num_cut += 1
        is_hopeless = self._client is not None and self._num_cut >= MAX_CUT_HANDSHAKES
        return Refused(f"{self._address} {self._cut_off()}") if is_hopeless else None

    def hint(self) -> str:
        """For the error of who got no answer in time."""
        return f": it {self._cut_off()}" if self._client is not None and self._num_cut else ""

    def _mismatch(self) -> str:
        if self._client is None:
            return "takes only peers with keys (CURVE), and none were given here"
        return "uses no keys (CURVE), and we do: what comes from there could come from anybody"

    def _cut_off(self) -> str:
        return f"ended the handshake {self._num_cut} times, as a listener does whose key is not the one that we expect"
