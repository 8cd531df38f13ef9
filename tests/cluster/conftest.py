"""What tests of whole pipelines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncpipe_coordinator.cli import main as coordinator_main


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of keys, as `keygen` makes it."""
    directory = tmp_path_factory.mktemp("keys") / "asyncpipe-keys"
    assert coordinator_main(["keygen", str(directory)]) == 0
    return directory
