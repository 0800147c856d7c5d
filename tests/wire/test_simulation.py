"""Interleavings of whole agents: some thousand random ones in all the runs of CI together, and every one that failed
once. ``make fuzz`` looks for more.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.wire.simulation import simulate

# what fuzzing found: (with strange messages, the choices), with what was wrong
FINDS: list[tuple[bool, str]] = [(False, ""), (True, "")]


@pytest.mark.parametrize(("strange", "data"), FINDS)
def test_finds(strange: bool, data: str) -> None:
    simulate(bytes.fromhex(data), strange)


@pytest.mark.parametrize("strange", [False, True], ids=["bad network", "strange messages"])
@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=100, max_size=600))
def test_random_interleavings(strange: bool, data: bytes) -> None:
    simulate(data, strange)
