"""Where this user's machine keeps what would be costly to find again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`asyncpipe` in `$XDG_CACHE_HOME`, or `~/.cache/asyncpipe`; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asyncpipe"
