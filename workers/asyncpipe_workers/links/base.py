"""What a tensor link is: hidden states from one stage to the next, as tagged futures with deadlines.

Words: Closed (this side closed the link), Broken (the other stage is gone), Timeout (it did not do its part in time), Busy (too
many transfers are under way), Invalid (a caller's mistake). After one of the first three the link is dead and the next epoch
makes a fresh one.
"""

from __future__ import annotations

import abc
import asyncio
from dataclasses import dataclass

import torch

from asyncpipe.wire.links import LinkKind, LinkOffer

__all__ = ["MAX_IN_FLIGHT", "MAX_TAG", "TIMEOUT_S", "LinkKind", "LinkOffer", "TensorLink", "TransferStatistics"]

MAX_TAG = 2**31 - 2  # Gloo's tags have 31 bits; the last one is the link's own
TIMEOUT_S = 60.0
MAX_IN_FLIGHT = 16


@dataclass(frozen=True, slots=True)
class TransferStatistics:
    in_flight: int
    high_water_mark: int  # of in_flight
    capacity: int
    completed: int
    completed_bytes: int


class TensorLink(abc.ABC):
    """One end of a one-way link between exactly two stages: the sender only sends, the receiver only receives.

    Transfers are posted ahead and overlap. A receive may be posted before its send or after it. With Gloo they match by tag, in
    any order. NCCL knows no tags: they match in the order of posting, and the user posts receives in the order of the sends, as
    a pipeline does, whose steps never overtake each other.
    """

    @abc.abstractmethod
    def send(self, tag: int, tensor: torch.Tensor, *, after: torch.cuda.Event | None = None) -> asyncio.Future[None]:
        """Done when the tensor's memory may be used again; until then its bytes must not change.

        A tensor on a GPU is read once `after` has happened there; without it, once all that the calling thread's current stream
        now holds is done. The future raises Timeout, Broken or Closed; `send` itself raises them on a dead link, Busy when too
        many transfers are under way, and Invalid. Cancelling the future does not call the transfer back.
        """

    @abc.abstractmethod
    def recv(self, tag: int, *, shape: tuple[int, ...], dtype: torch.dtype) -> asyncio.Future[torch.Tensor]:
        """The tensor sent under `tag`, in memory of its own on this end's device. Shape and dtype must be the sender's: Gloo
        ends a process that is sent more bytes than it asked for.

        On a GPU it may be used on what is the calling thread's current stream now, and its future is done when it is there. It
        raises, and cancels, as for `send`.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Fail what is under way with Closed, and return when threads, sockets and memory are let go of. Idempotent.

        The memory and the thread of a transfer that Gloo is in the middle of may stay until the deadline of that transfer.
        """

    @abc.abstractmethod
    def statistics(self) -> TransferStatistics: ...
