"""Requests of SGLang's that come with the same room number: one has the room until SGLang has cleared it."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from tests.wire import rig


def request(manager: SimpleNamespace, room: int) -> Any:
    """A request whose scheduler calls come from the test."""
    with warnings.catch_warnings():  # SGLang's own imports warn of what a CPU lacks
        warnings.simplefilter("ignore")
        from sglang_tpla.host.disaggregation.kv_manager import _Request
    made: Any = _Request()
    made.kv_mgr, made.bootstrap_room, made.conclude_state = manager, room, None
    return made


@pytest.mark.usefixtures("engine")
def test_a_room_that_has_ended_is_its_requests_until_it_is_cleared() -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    with contextlib.closing(rig.prefill_rank().agent) as agent:
        manager = SimpleNamespace(
            agent=agent, rooms_taken=set(), request_status={}, nap_if_idle=lambda room: None
        )
        first, second = request(manager, 7), request(manager, 7)
        first._open()
        agent.abort(7, "no longer wanted")
        assert first._state() == KVPoll.Failed
        second._open()
        assert second._state() == KVPoll.Failed
        assert second._reason == "room 7 is in use by another request of this prefill server"
        second._end("cleared")
        first._end("cleared")  # the room is still its own
        third = request(manager, 7)
        third._open()
        assert third._state() == KVPoll.Bootstrapping
        third._end("cleared")
        assert agent.stats().rooms == 0 and not manager.rooms_taken
