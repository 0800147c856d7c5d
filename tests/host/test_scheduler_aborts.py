"""An aborted request that waits to be prefilled: its sender hears of it, and no other's."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from sglang_tpla.host.disaggregation.aborts import drop_waiting


def waiting(rid: str, pending_bootstrap: bool = False) -> SimpleNamespace:
    return SimpleNamespace(rid=rid, pending_bootstrap=pending_bootstrap, disagg_kv_sender=Mock())


@pytest.mark.parametrize(
    ("rid", "abort_all", "dropped"),
    [("a", False, ["a1"]), ("c", False, []), ("", True, ["a1", "b"]), ("z", False, [])],
)
def test_waiting_requests(rid: str, abort_all: bool, dropped: list[str]) -> None:
    queue = [waiting("a1"), waiting("b"), waiting("c", pending_bootstrap=True)]
    queue.append(SimpleNamespace(rid="a2", pending_bootstrap=False, disagg_kv_sender=None))
    drop_waiting(
        SimpleNamespace(waiting_queue=queue),
        SimpleNamespace(rid=rid, abort_all=abort_all),
    )
    assert [req.rid for req in queue if req.disagg_kv_sender and req.disagg_kv_sender.clear.called] == dropped
