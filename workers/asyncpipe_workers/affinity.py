"""Which processors this process computes on."""

from __future__ import annotations

import os

from asyncpipe.cores import cpu_list, parse_cpu_list
from asyncpipe.errors import Invalid


def keep_to_cpus(cpus: str) -> None:
    """A list like 0-3,8, for the main thread and for this one, and so for the threads that either starts; empty: any.

    To be called before threads are started and memory is touched, so that both are where these CPUs are. Raises Invalid.
    """
    if not cpus:
        return
    try:
        chosen = parse_cpu_list(cpus)
        os.sched_setaffinity(os.getpid(), chosen)
        os.sched_setaffinity(0, chosen)
    except (ValueError, OverflowError):
        raise Invalid(f"--cpus {cpus}: give a list like 0-3,8") from None
    except OSError as error:
        raise Invalid(f"--cpus {cpus}: {error.strerror}; this process may use {cpu_list(os.sched_getaffinity(0))}") from None
    except AttributeError:
        raise Invalid("--cpus works on Linux only") from None
