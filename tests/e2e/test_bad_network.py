"""A bad network between real servers. After each fault the servers hold nothing, all their threads live, and the next
answer is the one from before, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.faulty import FAULTS, PROMPTS, Faulty, resources


@pytest.fixture(scope="module")
def faulty(nano_mla: str, nano_artifact: str, logs: Path) -> Iterator[Faulty]:
    """A prefill and a decode server of two ranks each, a network of ours between them."""
    with Faulty.start(nano_mla, nano_artifact, logs) as item:
        yield item


# these take as long as the others and find the same on the wire, where tests/wire tries them every time
RARE = ("drop", "duplicate", "reorder", "truncate")


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow if fault in RARE else ()) for fault in FAULTS]
)
def test_bad_network(faulty: Faulty, fault: str) -> None:
    """Requests under way are right or fail with a reason; then all is as before, and the next answer is the same."""
    before = [resources(server) for server in (faulty.prefill, faulty.decode)]
    with faulty.network(fault):
        answers = faulty.ask_all()
    faulty.check(answers, fault)
    faulty.at_rest(before)


def test_bootstrap_server_away(faulty: Faulty) -> None:
    """What is under way, and what follows between servers that know each other, does not need it."""
    faulty.door.refusing = True
    faulty.door.cut()
    assert faulty.check(faulty.ask_all(), "cut") == len(PROMPTS)
    faulty.door.refusing = False
    faulty.at_rest()
