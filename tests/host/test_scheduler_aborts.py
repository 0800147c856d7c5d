"""The abort of a request that waits for prefill reaches its own sender and no other."""

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

pytestmark = pytest.mark.usefixtures("imported")


def waiting(rid: str, pending_bootstrap: bool = False) -> SimpleNamespace:
    return SimpleNamespace(rid=rid, pending_bootstrap=pending_bootstrap, disagg_kv_sender=Mock())


@pytest.mark.parametrize(
    ("rid", "abort_all", "dropped"), [("a", False, ["a1"]), ("c", False, []), ("", True, ["a1", "b"]), ("z", False, [])]
)
def test_waiting_requests(rid: str, abort_all: bool, dropped: list[str]) -> None:
    from sglang_tpla.host.disaggregation.aborts import drop_waiting

    queue = [waiting("a1"), waiting("b"), waiting("c", pending_bootstrap=True)]
    queue.append(SimpleNamespace(rid="a2", pending_bootstrap=False, disagg_kv_sender=None))
    drop_waiting(SimpleNamespace(waiting_queue=queue), SimpleNamespace(rid=rid, abort_all=abort_all))
    assert [req.rid for req in queue if req.disagg_kv_sender and req.disagg_kv_sender.clear.called] == dropped


SAMPLE = "a_" + "0f" * 16


@pytest.mark.parametrize(
    ("rid", "abort_all", "reached"),
    [("a", False, ["a", SAMPLE]), ("ab", False, ["ab"]), ("gone", False, []), ("", True, ["a", "ab", "abc", SAMPLE])],
)
def test_an_abort_reaches_no_request_whose_id_only_begins_alike(rid: str, abort_all: bool, reached: list[str]) -> None:
    """SGLang compares beginnings of ids, so the hook hides the ids of other requests meanwhile."""
    from sglang_tpla.host.disaggregation.aborts import abort

    wrapped = SimpleNamespace(req=waiting("abc"))
    scheduler = SimpleNamespace(
        waiting_queue=[waiting("a")],
        grammar_manager=SimpleNamespace(grammar_queue=[waiting("ab")]),
        disagg_decode_prealloc_queue=SimpleNamespace(queue=[wrapped], retracted_queue=[]),
        running_batch=SimpleNamespace(reqs=[waiting(SAMPLE)]),
        last_batch=None,
        chunked_req=None,
    )
    live = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue, wrapped.req]
    live += scheduler.running_batch.reqs
    found: list[str] = []

    def stock(self: object, recv_req: SimpleNamespace) -> None:
        found.extend(req.rid for req in live if recv_req.abort_all or req.rid.startswith(recv_req.rid))

    abort(stock, scheduler, SimpleNamespace(rid=rid, abort_all=abort_all))
    assert found == reached
    assert [req.rid for req in live] == ["a", "ab", "abc", SAMPLE]


@pytest.mark.parametrize(
    ("rid", "abort_all", "left"), [("a", False, ["ab"]), ("gone", False, ["a", "ab"]), ("", True, [])]
)
def test_requests_of_a_paused_server_are_answered(rid: str, abort_all: bool, left: list[str]) -> None:
    """SGLang would compute these requests to their end once the server continues."""
    from sglang_tpla.host.disaggregation.aborts import abort

    def taken_back(rid: str, last: int | None) -> SimpleNamespace:
        forced = {"pd_rebootstrap_forced_output_id": last}
        return SimpleNamespace(rid=rid, output_ids=[3], return_logprob=False, finished_reason=None, **forced)

    held = [taken_back("a", 4), taken_back("ab", None)]
    queue = SimpleNamespace(queue=[], retracted_queue=[], held_rebootstrap_reqs=list(held))
    scheduler = SimpleNamespace(
        waiting_queue=[], grammar_manager=SimpleNamespace(grammar_queue=[]), disagg_decode_prealloc_queue=queue,
        running_batch=None, last_batch=None, chunked_req=None, output_streamer=Mock(),
    )  # fmt: skip
    abort(Mock(), scheduler, SimpleNamespace(rid=rid, abort_all=abort_all))
    assert [req.rid for req in queue.held_rebootstrap_reqs] == left
    answered = [call.args[0][0] for call in scheduler.output_streamer.stream_output.call_args_list]
    assert [req.rid for req in answered] == [req.rid for req in held if req.rid not in left]
    assert all(req.finished_reason.to_json()["type"] == "abort" for req in answered)
    assert [req.output_ids for req in held] == [[3, 4] if "a" not in left else [3], [3]]


@pytest.mark.parametrize("forgets", [True, False])
@pytest.mark.parametrize("hangs_up", [True, False])
def test_who_hangs_up_is_aborted_where_sglang_has_forgotten_it(engine: None, forgets: bool, hangs_up: bool) -> None:
    """In 0.5.18 and 0.5.19 a request's state goes with its client, and SGLang ignores an abort of an unknown id."""
    from sglang_tpla.host.requests import edge

    sent: list[str] = []
    manager = SimpleNamespace(_dispatch_to_scheduler=lambda req: sent.append(req.rid))
    if forgets:
        manager._discard_pending_req_states = lambda obj: None

    async def answer(self: Any, obj: Any, request: Any) -> Any:
        for token in range(3):
            yield token

    async def ask() -> list[int]:
        said = []
        outputs = edge.generate(answer, manager, SimpleNamespace(rid=["a", "b"]))
        async with contextlib.aclosing(outputs):
            async for token in outputs:
                said.append(token)
                if hangs_up:
                    break
        return said

    assert asyncio.run(ask()) == ([0] if hangs_up else [0, 1, 2])
    assert sent == (["a", "b"] if forgets and hangs_up else [])
