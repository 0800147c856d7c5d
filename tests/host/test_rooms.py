"""SGLang's requests with the same room number: one of them has the room until SGLang has cleared it."""

import contextlib
import itertools
import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.wire import rig


def request(manager: SimpleNamespace, room: int) -> Any:
    """Return a request that the test calls in the scheduler's place."""
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
        first._end("cleared")  # the room is still the first request's
        third = request(manager, 7)
        third._open()
        assert third._state() == KVPoll.Bootstrapping
        third._end("cleared")
        assert agent.stats().rooms == 0 and not manager.rooms_taken


@pytest.mark.usefixtures("engine")
def test_a_clock_that_is_set_fails_no_request_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own limit on the wait for a decode server compares times of day."""
    from sglang.srt.disaggregation.base.conn import KVPoll
    from sglang.srt.disaggregation.common.conn import CommonKVSender

    from sglang_tpla.host.disaggregation.kv_sender_receiver import TplaKVSender

    def make(self: Any, manager: Any, bootstrap_addr: str, room: int) -> None:
        self.kv_mgr, self.bootstrap_room, self.conclude_state = manager, room, None

    monkeypatch.setattr(CommonKVSender, "__init__", make)
    with contextlib.closing(rig.prefill_rank().agent) as agent:
        manager = MagicMock(
            agent=agent, rooms_taken=set(), request_status={}, attn_tp_rank=0, bootstrap_timeout=300,
            defer_decode_allocation=False,
        )  # fmt: skip
        manager.noted_prompt.return_value = 0
        manager.update_status.side_effect = manager.request_status.__setitem__
        sender: Any = TplaKVSender(manager, "server", 1)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3600)
        assert sender.poll() == KVPoll.Bootstrapping
        sender._made -= 301
        sender.poll()
        assert sender.poll() == KVPoll.Failed
        sender._end("over")


@pytest.mark.usefixtures("imported")
def test_only_the_prompt_of_the_room_that_is_opened_next_is_noted() -> None:
    """SGLang checks a retracted request again but does not open its room again, so nothing is kept for that room."""
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
    assert vars(manager) == {"agent": manager.agent, "_prompt": (99, 5), "forward_stream": None}


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("page", [1, 4, 64])
def test_an_answer_of_guesses_ends_before_the_cache_is_full(page: int) -> None:
    """Each step finds free slots for two steps, in whole pages as SGLang takes them, however many guesses are kept."""
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


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(("prompt", "said", "fits"), [(30, 59, True), (30, 60, True), (30, 61, False)])
def test_an_answer_that_is_computed_anew_counts_once(
    monkeypatch: pytest.MonkeyPatch, prompt: int, said: int, fits: bool
) -> None:
    """SGLang waits until prompt, answer so far and ``max_new_tokens`` fit into the cache, and never counts less."""
    from sglang_tpla.host.disaggregation.capacity import exceeds
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager
    from sglang_tpla.host.disaggregation.same_prompt import compare_digest

    manager = TplaKVManager.__new__(TplaKVManager)
    manager.agent, manager.decline = SimpleNamespace(role="decode"), MagicMock()  # type: ignore[method-assign]
    scheduler = SimpleNamespace(spec_algorithm=SimpleNamespace(is_none=lambda: True), output_streamer=MagicMock())
    queue = SimpleNamespace(
        kv_manager=manager, max_total_num_tokens=100, num_reserved_decode_tokens=10, scheduler=scheduler
    )
    params = SimpleNamespace(max_new_tokens=68)
    req = SimpleNamespace(
        bootstrap_room=1, bootstrap_host="p", bootstrap_port=1, origin_input_ids=[1] * prompt, output_ids=[2] * said,
        sampling_params=params, pd_rebootstrap_in_progress=True, return_logprob=False, finished_reason=None,
    )  # fmt: skip
    assert exceeds(lambda self, req: False, queue, req) is not fits
    if not fits:
        message = req.finished_reason.message
        assert message.startswith("the prompt has 91 tokens with those of its answer so far") and "most 90" in message
        return
    assert prompt + said + params.max_new_tokens <= queue.max_total_num_tokens
    assert manager.noted_prompt(1) == prompt + said
    row = MagicMock()
    compare_digest(lambda self, one: None, row, SimpleNamespace(req=req, is_rebootstrap=True, metadata_buffer_index=0))
    assert params.max_new_tokens == 68


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
        assert sender._early_send_wait_event is None  # this step itself wrote the rest of the prompt
        sender.send(source[3:], num_kv_tokens=rig.PAGE)
        rig.succeed(1, decode)
        assert written.waited
        rig.check_rows(prefill, decode, source, target, 4 * rig.PAGE)
        sender._end("over")


@pytest.mark.usefixtures("engine")
def test_rows_are_received_behind_the_steps_that_the_engine_has_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue that opens rooms knows the engine's stream; what it has queued may write into slots that are free."""
    from sglang_tpla.host.disaggregation.capacity import exceeds
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager
    from sglang_tpla.host.disaggregation.kv_sender_receiver import TplaKVReceiver

    class Stream:
        def record_event(self) -> str:
            return "behind the steps"

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    manager = TplaKVManager.__new__(TplaKVManager)
    manager.agent, manager.forward_stream = MagicMock(role="decode"), None
    assert manager.steps_under_way() is None
    plain = SimpleNamespace(spec_algorithm=SimpleNamespace(is_none=lambda: True), forward_stream=Stream())
    queue = SimpleNamespace(
        kv_manager=manager, max_total_num_tokens=100, num_reserved_decode_tokens=10, scheduler=plain
    )
    assert not exceeds(lambda *_: False, queue, MagicMock(origin_input_ids=[1], pd_rebootstrap_in_progress=False))
    receiver: Any = TplaKVReceiver.__new__(TplaKVReceiver)
    receiver.kv_mgr, receiver.bootstrap_room, receiver.conclude_state = manager, 7, None
    receiver._opened, receiver.bootstrap_infos, receiver.required_dst_info_num = True, [{}], 1
    receiver.send_metadata([2], aux_index=3)
    assert manager.agent.request.call_args.kwargs["after"] == "behind the steps"


def sender_of(manager: SimpleNamespace, room: int, pages: int) -> Any:
    """A sender as SGLang leaves it behind after ``init``."""
    from sglang_tpla.host.disaggregation.kv_sender_receiver import TplaKVSender

    made: Any = TplaKVSender.__new__(TplaKVSender)
    made.kv_mgr, made.bootstrap_room, made.conclude_state = manager, room, None
    made.curr_idx, made.num_kv_indices, made.aux_index = 0, pages, 0
    made._open(0)
    return made


def decode_manager(monkeypatch: pytest.MonkeyPatch, agent: Any) -> Any:
    """Return a manager on decode with SGLang's tables; its prefill server refuses to recompute retracted requests."""
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    from sglang_tpla.host.disaggregation import kv_sender_receiver
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager

    monkeypatch.setattr(kv_sender_receiver, "settings", lambda: SimpleNamespace(role="decode"))
    manager: Any = MagicMock(agent=agent, rooms_taken=set(), request_status={}, attn_tp_rank=0, failure_records={})
    manager.prefill_info_table = {"server": None}
    manager.noted_prompt.return_value = 0
    manager._get_prefill_recompute_session().post.return_value = SimpleNamespace(status_code=400, text="no")
    for owner, names in (
        (CommonKVManager, ("update_status", "record_failure", "_run_prefill_recompute")),
        (TplaKVManager, ("_fail_prefill_recompute",)),
    ):
        for name in names:
            setattr(manager, name, getattr(owner, name).__get__(manager))
    return manager


def opened(manager: Any, prefill: Any) -> Any:
    """A receiver of room 1, open on the decode rank."""
    from sglang_tpla.host.disaggregation.kv_sender_receiver import TplaKVReceiver

    receiver: Any = TplaKVReceiver(manager, "server", 1)
    receiver._open([prefill.peer])
    return receiver


def refuse_anew(receiver: Any) -> None:
    """Let prefill refuse to compute a request anew, on a thread as in SGLang."""
    payload = {"rid": "r", "bootstrap_room": receiver.bootstrap_room}
    asked = threading.Thread(target=receiver.kv_mgr._run_prefill_recompute, args=(receiver, "http://p", payload))
    asked.start()
    asked.join()


@pytest.mark.usefixtures("engine")
def test_a_request_that_prefill_does_not_compute_anew_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that asks prefill finds the refusal while the scheduler is about to ask the agent for the room."""
    from sglang.srt.disaggregation.base.conn import KVPoll
    from sglang.srt.disaggregation.common.conn import KVTransferError

    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    manager = decode_manager(monkeypatch, decode.agent)
    with rig.serving(prefill, decode):
        receiver = opened(manager, prefill)
        manager.nap_if_idle = lambda room: refuse_anew(receiver)
        receiver.poll()  # the scheduler ends with an exception that leaves it
        assert receiver.poll() == KVPoll.Failed
        with pytest.raises(KVTransferError, match=r"/generate failed for rid=r \(status=400\)"):
            receiver.failure_exception()
        receiver.clear()
        assert decode.agent.stats().rooms == 0 and not manager.rooms_taken and not manager.request_status


@pytest.mark.usefixtures("engine")
def test_a_late_refusal_to_compute_anew_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's abort also makes prefill refuse; by then the request has left, and another may have its room."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    prefill, decode = rig.prefill_rank(), rig.decode_rank()
    manager = decode_manager(monkeypatch, decode.agent)
    with rig.serving(prefill, decode):
        first = opened(manager, prefill)
        first.abort()
        with contextlib.suppress(Exception):
            first.failure_exception()
        first.clear()
        second = opened(manager, prefill)
        refuse_anew(first)
        assert second.poll() != KVPoll.Failed
        second._end("over")
        second.clear()
        refuse_anew(second)
        assert not manager.request_status and not manager.failure_records
