"""The servers of all tests in this folder; started once.

``TEST_FAULT_ROWS=sketched`` gives the decode server with two ranks sketched rows instead of plain ones.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.faulty import Faulty


@pytest.fixture(scope="package")
def statistics_folder(logs: Path) -> Path:
    """The folder in which the prefill ranks keep the statistics of their traffic."""
    return logs / "statistics"


@pytest.fixture(scope="package")
def faulty(
    nano_mla: str, nano_artifact: str, sketched_artifact: str, logs: Path, statistics_folder: Path
) -> Iterator[Faulty]:
    """Prefill with two ranks, decode with two, decode with one, and a faulty network between them."""
    statistics = ("--tpla-statistics-folder", str(statistics_folder), "--tpla-statistics-every-tokens", "1000")
    artifact = sketched_artifact if os.environ.get("TEST_FAULT_ROWS") == "sketched" else nano_artifact
    with Faulty.start(nano_mla, artifact, logs, *statistics) as item:
        yield item
