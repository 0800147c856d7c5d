"""Requests of SGLang's that come with the same room number: one has the room until SGLang has cleared it."""

import contextlib
import itertools
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.wire import rig


def request(manager: SimpleNamespace, room: int) -> Any:
    """A request whose scheduler calls come from the test."""
    from sglang_tpla.host.disaggregation.kv_sender_receiver import _Request

    made: Any = _Request()
    made.kv_mgr, made.bootstrap_room, made.conclude_state = manager, room, None
    return made


@pytest.mark.usefixtures("engine")
def test_a_room_that_has_ended_is_its_requests_until_it_is_cleared() -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    with contextlib.closing(rig.prefill_rank().agent) as agent:
        manager = SimpleNamespace(
            agent=agent, rooms_taken=set(), request_status={}, nap_if_idle=lambda room: None, attn_tp_rank=0
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


@pytest.mark.usefixtures("imported")
def test_only_the_prompt_of_the_room_that_is_opened_next_is_noted() -> None:
    """A retracted request is checked again, and its room is not opened again: nothing is kept for it."""
    from sglang_tpla.host.disaggregation.capacity import exceeds
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager

    manager = TplaKVManager.__new__(TplaKVManager)
    manager.agent = SimpleNamespace(role="decode")
    plain = SimpleNamespace(spec_algorithm=SimpleNamespace(is_none=lambda: True))
    queue = SimpleNamespace(
        kv_manager=manager, max_total_num_tokens=100, num_reserved_decode_tokens=10, scheduler=plain
    )
    for room in range(1, 100):
        assert not exceeds(
            lambda self, req: False, queue, SimpleNamespace(bootstrap_room=room, origin_input_ids=[1] * 5)
        )
    assert [manager.noted_prompt(room) for room in (1, 98, 99, None)] == [0, 0, 5, 0]
    assert vars(manager) == {"agent": manager.agent, "_prompt": (99, 5)}


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("page", [1, 4, 64])
def test_an_answer_of_guesses_ends_before_the_cache_is_full(page: int) -> None:
    """However many guesses are kept, each step finds free slots for two steps, in whole pages, as SGLang takes them."""
    from sglang_tpla.host.disaggregation.capacity import exceeds
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager

    manager = TplaKVManager.__new__(TplaKVManager)
    manager.agent = SimpleNamespace(role="decode")
    slots, guessing = 50 * page, SimpleNamespace(spec_algorithm=SimpleNamespace(is_none=lambda: False))
    queue = SimpleNamespace(
        kv_manager=manager, max_total_num_tokens=slots, num_reserved_decode_tokens=20, scheduler=guessing,
        token_to_kv_pool_allocator=SimpleNamespace(page_size=page),
    )  # fmt: skip
    for prompt, asked in itertools.product(range(1, slots - 20, 7), (0, 1, 5, 10**6)):
        params = SimpleNamespace(max_new_tokens=asked)
        req = SimpleNamespace(bootstrap_room=1, origin_input_ids=[1] * prompt, sampling_params=params)
        assert not exceeds(lambda self, req: False, queue, req)
        if prompt + asked + 8 + page <= slots:
            assert params.max_new_tokens == asked
        last_step = prompt + params.max_new_tokens - 2  # tokens in the cache before it, at most
        assert params.max_new_tokens < 2 or -(-(last_step + 8) // page) * page <= slots
        assert params.max_new_tokens >= min(asked, 1)


@pytest.mark.usefixtures("engine")
def test_a_prefix_sent_ahead_is_read_when_its_event_says_so() -> None:
    """SGLang leaves an event on the sender for pages that the step before may still write."""
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    source, target, written = rig.pages(0, 4), rig.pages(1, 4), rig.WrittenLater(prefill)
    with rig.serving(prefill, decode):
        manager = SimpleNamespace(agent=prefill.agent, rooms_taken=set())
        sender = sender_of(manager, room=1, pages=4)
        rig.ask(decode, [prefill.peer], 1, target)
        sender._early_send_wait_event = written
        sender.send(source[:3], num_kv_tokens=3 * rig.PAGE)
        assert sender._early_send_wait_event is None  # the rest of the prompt is this step's own
        sender.send(source[3:], num_kv_tokens=rig.PAGE)
        rig.succeed(1, decode)
        assert written.waited
        rig.check_rows(prefill, decode, source, target, 4 * rig.PAGE)
        sender._end("over")


def sender_of(manager: SimpleNamespace, room: int, pages: int) -> Any:
    """A sender as SGLang leaves it behind after ``init``."""
    from sglang_tpla.host.disaggregation.kv_sender_receiver import TplaKVSender

    made: Any = TplaKVSender.__new__(TplaKVSender)
    made.kv_mgr, made.bootstrap_room, made.conclude_state = manager, room, None
    made.curr_idx, made.num_kv_indices, made.aux_index = 0, pages, 0
    made._open(0)
    return made


@pytest.mark.usefixtures("engine")
def test_a_request_that_another_thread_aborts_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks prefill for a retracted request on a thread, which aborts the receiver where prefill refuses."""
    from sglang.srt.disaggregation.base.conn import KVPoll
    from sglang.srt.disaggregation.common.conn import KVTransferError

    from sglang_tpla.host.disaggregation import kv_sender_receiver

    monkeypatch.setattr(kv_sender_receiver, "settings", lambda: SimpleNamespace(role="decode"))
    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    manager = MagicMock(agent=decode.agent, rooms_taken=set(), request_status={}, attn_tp_rank=0, failure_records={})
    manager.prefill_info_table = {"server": None}
    manager.noted_prompt.return_value = 0
    manager.update_status.side_effect = manager.request_status.__setitem__
    manager.record_failure.side_effect = manager.failure_records.__setitem__
    with rig.serving(prefill, decode):
        receiver: Any = kv_sender_receiver.TplaKVReceiver(manager, "server", 1)
        receiver._open([prefill.peer])

        def abort_meanwhile(room: int) -> None:
            thread = threading.Thread(target=receiver.abort)
            thread.start()
            thread.join()

        manager.nap_if_idle = abort_meanwhile
        receiver.poll()  # the scheduler ends with an exception that leaves it
        assert receiver.poll() == KVPoll.Failed
        with pytest.raises(KVTransferError, match="Aborted by AbortReq"):
            receiver.failure_exception()
        receiver.clear()
        assert decode.agent.stats().rooms == 0 and not manager.rooms_taken and not manager.request_status
