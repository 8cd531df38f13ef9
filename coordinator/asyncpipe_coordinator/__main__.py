"""`python -m asyncpipe_coordinator` is `asyncpipe-coordinator`."""

import sys

from asyncpipe_coordinator.cli import main

sys.exit(main())
