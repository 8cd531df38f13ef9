"""Hidden states from stage to stage over torch.distributed: see `base` for what a link is, `rendezvous` for how one is made."""

from asyncpipe_workers.links.base import LinkKind, LinkOffer, TensorLink, TransferStatistics
from asyncpipe_workers.links.choose import LinkWish, Seat, choose_link, offered_here
from asyncpipe_workers.links.rendezvous import Hosting, host, join

__all__ = [
    "Hosting",
    "LinkKind",
    "LinkOffer",
    "LinkWish",
    "Seat",
    "TensorLink",
    "TransferStatistics",
    "choose_link",
    "host",
    "join",
    "offered_here",
]
