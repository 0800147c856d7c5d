"""The servers of all tests in this folder; started once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.faulty import Faulty


@pytest.fixture(scope="package")
def statistics_folder(logs: Path) -> Path:
    """Where the prefill ranks keep what they sum up of their traffic."""
    return logs / "statistics"


@pytest.fixture(scope="package")
def faulty(nano_mla: str, nano_artifact: str, logs: Path, statistics_folder: Path) -> Iterator[Faulty]:
    """Prefill with two ranks, decode with two, decode with one, and a network of ours between them."""
    statistics = ("--tpla-statistics-folder", str(statistics_folder), "--tpla-statistics-every-tokens", "1000")
    with Faulty.start(nano_mla, nano_artifact, logs, *statistics) as item:
        yield item
