"""The actor runtime: usable without any model."""

from asyncpipe.actors.actor import Actor, Down
from asyncpipe.actors.mailbox import MailboxStatistics
from asyncpipe.actors.ref import ActorRef
from asyncpipe.actors.supervisor import RestartPolicy
from asyncpipe.actors.system import ActorSystem, SystemStatistics
from asyncpipe.actors.transfers import TensorPort

__all__ = [
    "Actor",
    "ActorRef",
    "ActorSystem",
    "Down",
    "MailboxStatistics",
    "RestartPolicy",
    "SystemStatistics",
    "TensorPort",
]
