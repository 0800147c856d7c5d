"""Let benchmarks start together and measure one after another, since most of their time is the start of servers."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOCK = "SGLANG_TPLA_BENCH_LOCK"  # names a file


@contextmanager
def alone() -> Iterator[None]:
    """Hold a lock on the file that the environment names, if any, while something is timed."""
    if LOCK not in os.environ:
        yield
        return
    with open(os.environ[LOCK], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
