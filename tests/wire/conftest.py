"""The pools of these tests are so small that their rows would never be moved in extents."""

from __future__ import annotations

import pytest

from sglang_tpla.transfer.memory import iovec
from tests.wire import rig


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one page are sent from where they lie, and received there."""
    monkeypatch.setattr(iovec, "MIN_EXTENT_BYTES", 128)


@pytest.fixture(params=["plain", "sketched"])
def rows_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decode ranks that are not given rows have these, child processes' too; for whole files by ``usefixtures``."""
    monkeypatch.setattr(rig, "ROWS", request.param)
    monkeypatch.setenv("TEST_WIRE_ROWS", request.param)
    return request.param
