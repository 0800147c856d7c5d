"""Benchmarks that start together and measure one after another: most of their time is servers coming up."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOCK = "SGLANG_TPLA_BENCH_LOCK"  # a file


@contextmanager
def alone() -> Iterator[None]:
    """Hold the file that the environment names, if it does, while something is timed."""
    if LOCK not in os.environ:
        yield
        return
    with open(os.environ[LOCK], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
