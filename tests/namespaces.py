"""Several hosts on one machine: network namespaces, each with a cable to a switch that a test can slow down and cut.

    with a_network(["left", "right"]) as network:
        subprocess.run(network["left"].command(["ping", "-c", "1", network["right"].ip]))
        network.part("left", "right")

Namespaces have no names here: each lives as long as a process is in it or holds its descriptor, and its cable as long as both
its ends. So nothing is left behind, not even by SIGKILL, and nothing is added to the machine's own network.

The switch is this file, run as a process in a namespace of its own: it reads Ethernet frames at its end of each cable and
writes them to another. Not every kernel can delay packets itself (`tc qdisc add … netem`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SUBNET = "10.77.0"  # every network has it to itself
DEVICE = "eth0"  # a host's end of its cable
NEEDED = ("ip", "nsenter")
COMMAND_TIMEOUT_S = 10.0

CLONE_NEWUTS, CLONE_NEWNET = 0x0400_0000, 0x4000_0000  # linux/sched.h
SIOCETHTOOL = 0x8946  # linux/sockios.h
ETHTOOL_STXCSUM, ETHTOOL_STSO = 0x17, 0x1F  # linux/ethtool.h
ETH_P_ALL = 3  # linux/if_ether.h
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23  # linux/socket.h, linux/if_packet.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h

MAX_COMMAND_BYTES = 65_536
MAX_FRAME_BYTES = 2048
MAX_QUEUED_FRAMES = 20_000  # in the switch; more are dropped, as by any switch
MAX_BURST_FRAMES = 64  # of one cable before the others have their turn
PORT_BUFFER_BYTES = 16 << 20


class Unavailable(Exception):
    """No network can be made here, and why."""


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace for the network and the host's name. The descriptors keep it alive."""

    name: str
    ip: str
    net_fd: int
    uts_fd: int

    def command(self, argv: Sequence[str]) -> list[str]:
        """What runs `argv` on this host, as the same process, while the network is open."""
        return ["nsenter", f"--net={_path_of(self.net_fd)}", f"--uts={_path_of(self.uts_fd)}", "--", *argv]

    def call(self, function: Callable[[], T]) -> T:
        """On a thread on this host. A socket made there stays there."""

        def there() -> T:
            for fd in (self.net_fd, self.uts_fd):
                _check(_libc().setns(fd, 0), "setns")
            return function()

        return _on_a_thread(there)

    def close(self) -> None:
        os.close(self.net_fd)
        os.close(self.uts_fd)


class Network:
    """Made by `a_network`. All cables are whole and quick to begin with."""

    def __init__(self, hosts: Sequence[Host], control: socket.socket) -> None:
        self._hosts = {host.name: host for host in hosts}
        self._control = control
        self._cuts: set[tuple[str, str]] = set()
        self._delay_s = 0.0

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def cut(self, name: str) -> None:
        """The cable of a host, which reaches nobody any more."""
        for other in self._hosts.keys() - {name}:
            self._cuts |= {(name, other), (other, name)}
        self._tell()

    def part(self, left: str, right: str) -> None:
        """They reach all others as before."""
        self._cuts |= {(left, right), (right, left)}
        self._tell()

    def heal(self) -> None:
        """Whatever was cut or parted."""
        self._cuts.clear()
        self._tell()

    def delay(self, seconds: float) -> None:
        """Of every frame from one host to another: half of a round trip."""
        self._delay_s = seconds
        self._tell()

    def _tell(self) -> None:
        """Returns when it holds."""
        self._control.send(json.dumps({"cuts": sorted(self._cuts), "delay_s": self._delay_s}).encode())
        if not self._control.recv(1):
            raise RuntimeError("the switch has ended")


@contextlib.contextmanager
def a_network(names: Sequence[str]) -> Iterator[Network]:
    """Hosts that reach each other, and nothing else. Raises Unavailable."""
    _check_prerequisites()
    with contextlib.ExitStack() as stack:
        hosts = [_make_host(name, f"{SUBNET}.{number}", stack) for number, name in enumerate(names, start=1)]
        switch = _make_host("switch", "", stack)
        switch.call(lambda: _ip([line for host in hosts for line in _cable(host)]))
        for host in hosts:
            host.call(partial(_plug_in, host.ip))
        control = stack.enter_context(_running_switch(switch, names))
        network = Network(hosts, control)
        network.heal()  # answered as soon as the switch is there
        yield network


def _check_prerequisites() -> None:
    if sys.platform != "linux":
        raise Unavailable("network namespaces need Linux")
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        raise Unavailable(f"network namespaces need {' and '.join(missing)}, not found here")


def _make_host(name: str, ip: str, stack: contextlib.ExitStack) -> Host:
    def make() -> Host:
        _check(_libc().unshare(CLONE_NEWNET | CLONE_NEWUTS), "unshare")
        socket.sethostname(name)
        namespaces = Path("/proc/thread-self/ns")
        return Host(name, ip, os.open(namespaces / "net", os.O_RDONLY), os.open(namespaces / "uts", os.O_RDONLY))

    host = _on_a_thread(make)
    stack.callback(host.close)
    return host


def _cable(host: Host) -> list[str]:
    """For `ip`, on the switch: the end there has the host's name."""
    return [
        f"link add name {host.name} type veth peer name {DEVICE} netns {_path_of(host.net_fd)}",
        f"link set dev {host.name} up",
    ]


def _plug_in(ip: str) -> None:
    """A cable carries packets as they are on a wire: of one MTU, with checksums; so the kernel may not put these off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in (ETHTOOL_STXCSUM, ETHTOOL_STSO):
            off = array("I", [command, 0])  # struct ethtool_value
            request = struct.pack("16sP16x", DEVICE.encode(), off.buffer_info()[0])  # struct ifreq
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)
    _ip([f"address add {ip}/24 dev {DEVICE}", "link set dev lo up", f"link set dev {DEVICE} up"])


def _ip(lines: Sequence[str]) -> None:
    done = subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"the kernel makes no virtual cables here: {done.stderr.strip()}")


@contextlib.contextmanager
def _running_switch(host: Host, names: Sequence[str]) -> Iterator[socket.socket]:
    """Yields what it is commanded by; its end is the switch's."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(COMMAND_TIMEOUT_S)
    with its:
        process = subprocess.Popen(host.command([sys.executable, __file__, *names]), stdin=its.fileno())
    try:
        with ours:
            yield ours
    finally:
        try:
            process.wait(COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _path_of(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"


def _on_a_thread(function: Callable[[], T]) -> T:
    """Namespaces are a thread's: those of one that ends are nobody else's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise Unavailable(f"the kernel refuses network namespaces: {what}: {os.strerror(ctypes.get_errno())}")


# --- the switch, a process of its own ---------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Port:
    """The switch's end of a host's cable. Frames to hosts of `cut_off` go no further."""

    name: str
    socket: socket.socket
    cut_off: frozenset[str] = frozenset()

    @classmethod
    def open(cls, name: str) -> Port:
        port = cls(name, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        port.socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        port.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, PORT_BUFFER_BYTES)
        port.socket.bind((name, 0))
        port.socket.setblocking(False)
        return port


@dataclass(slots=True)
class Switch:
    """Learns who is where, holds each frame back for `delay_s`, and lets none through where a cable is cut."""

    ports: Mapping[int, Port]  # by descriptor
    delay_s: float = 0.0
    _known: dict[bytes, Port] = field(default_factory=dict)  # by Ethernet address
    _queue: deque[tuple[float, Port, bytes]] = field(default_factory=deque)  # when it is due, and where

    def run(self, control: socket.socket) -> None:
        """Until nobody holds the other end of `control`."""
        with select.epoll() as poll:
            for fd in (control.fileno(), *self.ports):
                poll.register(fd, select.EPOLLIN)
            while True:
                for fd, _ in poll.poll(self._until_due_s()):
                    if fd != control.fileno():
                        self._take(self.ports[fd])
                    elif command := control.recv(MAX_COMMAND_BYTES):
                        self._obey(json.loads(command))
                        control.send(b"!")
                    else:
                        return
                self._deliver()

    def _until_due_s(self) -> float | None:
        return max(self._queue[0][0] - time.monotonic(), 0.0) if self._queue else None

    def _obey(self, command: dict[str, Any]) -> None:
        self.delay_s = command["delay_s"]
        for port in self.ports.values():
            port.cut_off = frozenset(other for name, other in command["cuts"] if name == port.name)

    def _take(self, source: Port) -> None:
        """What has come from a host."""
        due_s = time.monotonic() + self.delay_s
        for _ in range(MAX_BURST_FRAMES):
            try:
                frame = source.socket.recv(MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            self._known[frame[6:12]] = source
            known = self._known.get(frame[:6])
            for target in (known,) if known is not None else self.ports.values():
                if target is not source and target.name not in source.cut_off and len(self._queue) < MAX_QUEUED_FRAMES:
                    self._queue.append((due_s, target, frame))

    def _deliver(self) -> None:
        """What is due. A cable that can take no more loses frames, as cables do."""
        now_s = time.monotonic()
        while self._queue and self._queue[0][0] <= now_s:
            _, target, frame = self._queue.popleft()
            with contextlib.suppress(OSError):
                target.socket.send(frame)


def main(names: Sequence[str]) -> None:
    ports = [Port.open(name) for name in names]
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as control:
        Switch({port.socket.fileno(): port for port in ports}).run(control)


if __name__ == "__main__":
    main(sys.argv[1:])
