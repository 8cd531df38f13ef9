"""Child processes: started, watched, stopped, reaped."""

from asyncpipe.process.loop import exit_on_term, run
from asyncpipe.process.reap import die_with_parent
from asyncpipe.process.spawn import ChildProcess

__all__ = ["ChildProcess", "die_with_parent", "exit_on_term", "run"]
