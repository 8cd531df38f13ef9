"""Where a stage's bytes live, as messages say it."""

from __future__ import annotations

import msgspec

from asyncpipe.policy import Shares
from asyncpipe.wire.fields import Count, Seconds


class TierBytes(msgspec.Struct, frozen=True, array_like=True):
    """Bytes on each memory tier."""

    device: Count = 0
    host: Count = 0
    disk: Count = 0

    @classmethod
    def shared_out(cls, num_bytes: int, shares: Shares) -> TierBytes:
        """By percent; what rounding leaves over is on disk."""
        device, host = (int(num_bytes * share / 100) for share in (shares.device, shares.host))
        return cls(device, host, num_bytes - device - host)

    @property
    def total(self) -> int:
        return self.device + self.host + self.disk


class TierReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a stage's bytes live: of its weights as they are stored, of its KV memory, and of the activations of a full step;
    `buffers` are working memory on the device, reused for every layer."""

    weights: TierBytes = TierBytes()
    cache: TierBytes = TierBytes()
    activations: TierBytes = TierBytes()
    buffers: Count = 0


class Moved(msgspec.Struct, frozen=True, array_like=True):
    """Bytes that went from one tier to another, the seconds that all threads spent on them, and those of the compute thread
    waiting for them."""

    num_bytes: Count = 0
    busy_s: Seconds = 0.0
    wait_s: Seconds = 0.0


class TransferReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What has moved since the stage was loaded."""

    weights: Moved = Moved()
    cache_loads: Moved = Moved()
    cache_stores: Moved = Moved()
    activations: Moved = Moved()

    @property
    def num_bytes(self) -> int:
        return sum(moved.num_bytes for moved in self._all)

    @property
    def wait_s(self) -> float:
        return sum(moved.wait_s for moved in self._all)

    @property
    def _all(self) -> tuple[Moved, ...]:
        return self.weights, self.cache_loads, self.cache_stores, self.activations
