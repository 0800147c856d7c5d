"""The pools of these tests are so small that their rows would never be moved in runs."""

from __future__ import annotations

import pytest

from sglang_tpla.transfer.memory import iovec as runs


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one page are sent from where they lie, and received there."""
    monkeypatch.setattr(runs, "MIN_RUN_BYTES", 128)
