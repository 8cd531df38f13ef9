"""For child processes: to end when their parent does, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT_VARIABLE = "ASYNCPIPE_PARENT_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 0.5


def die_with_parent() -> None:
    """Call first in a child started by `ChildProcess`; does nothing in any other process.

    On Linux the kernel kills this process when its parent is gone; elsewhere a thread looks twice a second.
    """
    expected = os.environ.pop(PARENT_VARIABLE, None)
    if expected is None:
        return
    parent_pid = int(expected)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_poll, args=(parent_pid,), name="parent watch", daemon=True).start()
    if os.getppid() != parent_pid:  # it was gone before we asked
        os._exit(1)


def _poll(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    os._exit(1)
