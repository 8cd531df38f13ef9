"""`python -m asyncpipe_workers` is `asyncpipe-worker`."""

import sys

from asyncpipe_workers.cli import main

sys.exit(main())
