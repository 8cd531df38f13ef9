"""Where a stage's bytes live, as messages say it."""

from __future__ import annotations

import msgspec

from asyncpipe.wire.fields import Count


class TierBytes(msgspec.Struct, frozen=True, array_like=True):
    """Bytes on each memory tier."""

    device: Count = 0
    host: Count = 0
    disk: Count = 0

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
