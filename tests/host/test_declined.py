"""A request that is refused where it enters: both servers' clients get the reason, and nobody else's room ends."""

import asyncio
import dataclasses
import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest

pytestmark = pytest.mark.usefixtures("imported")


def request(room: Any = 5, host: Any = "p_1", port: Any = 8998) -> SimpleNamespace:
    return SimpleNamespace(bootstrap_room=room, bootstrap_host=host, bootstrap_port=port, rid="a")


@pytest.mark.parametrize(
    ("fields", "places"),
    [
        ((5, "P_1.", 8998), [[5, "p_1", 8998]]),
        (([5, 6], "p_1", [1, 2]), [[5, "p_1", 1], [6, "p_1", 2]]),
        (([5, None, "x", -1, 2**63, True], "p_1", None), [[5, "p_1", None]]),
        ((5, "a/b", 1), []),
        ((5, None, 1), []),
        ((5, "p_1", 70000), []),
        ((5, "2.2.2.2", 1), []),  # SGLang's mark of a server's requests to itself
        ((None, "p_1", 1), []),
        (([], "p_1", 1), []),
        (({}, [], "y"), []),
    ],
)
def test_the_rooms_in_which_the_other_server_may_wait(fields: Any, places: list[Any]) -> None:
    from sglang_tpla.host.requests.declined import declined

    message = declined(request(*fields), "prefill", ValueError("no such LoRA"))
    assert (json.loads(message.abort_message)["places"] if message else []) == places


@pytest.mark.parametrize("aside", [True, False])
def test_the_scheduler_is_told_by_the_thread_that_its_socket_belongs_to(aside: bool) -> None:
    """Later releases of SGLang convert a request on another thread, which has no event loop."""
    from sglang_tpla.host.requests.edge import tell_other_server

    told = list[Any]()

    async def refuse() -> None:
        loop = asyncio.get_running_loop()
        heard = loop.create_future()

        def dispatch(message: Any) -> None:
            told.append((asyncio.get_running_loop(), json.loads(message.abort_message)["places"]))
            heard.set_result(None)

        manager = SimpleNamespace(event_loop=loop, _dispatch_to_scheduler=dispatch)
        arguments = manager, request(), ValueError("no such LoRA")
        if aside:
            await loop.run_in_executor(None, tell_other_server, *arguments)
        else:
            tell_other_server(*arguments)
        await asyncio.wait_for(heard, 60)
        assert told == [(loop, [[5, "p_1", 8998]])]

    asyncio.run(refuse())


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("blamed", [True, False])
def test_a_scheduler_that_hears_of_it_tells_its_agent_and_aborts_nothing(mode: str, blamed: bool) -> None:
    from sglang.srt.disaggregation.utils import DisaggregationMode

    from sglang_tpla.host.disaggregation.aborts import abort
    from sglang_tpla.host.requests.declined import declined
    from sglang_tpla.transfer.room import REFUSED

    stock, queue = Mock(), Mock()
    scheduler = SimpleNamespace(
        disaggregation_mode=DisaggregationMode(mode),
        **{f"disagg_{'decode_prealloc' if mode == 'decode' else 'prefill_bootstrap'}_queue": queue},
    )
    error = ValueError("no such LoRA") if blamed else OSError("no such LoRA")
    abort(stock, scheduler, declined(request([5, 6]), mode, error))
    (reason,) = {args.args[3] for args in queue.kv_manager.decline.mock_calls}
    assert queue.kv_manager.decline.mock_calls == [call(room, "p_1", 8998, reason) for room in (5, 6)]
    assert "no such LoRA" in reason and f"the {mode} server" in reason and (REFUSED in reason) is blamed
    assert not stock.called


async def _wait_one_response(error: Exception) -> None:
    """Stand in for SGLang's function of this name, in which an error is the scheduler's answer."""
    raise error


@pytest.mark.parametrize("by", ["edge", "scheduler", "after the first token"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("too hot"), "too hot"),
        (KeyError("x"), "a field of the request has a wrong value: 'x'"),
        (OSError("disk"), "disk"),
    ],
)
def test_only_what_no_scheduler_has_seen_is_told(by: str, error: Exception, said: str) -> None:
    from sglang_tpla.host.requests import edge

    sent: list[Any] = []

    async def answer(self: Any, obj: Any, _request: Any) -> Any:
        if by == "scheduler":
            await _wait_one_response(error)
        if by == "after the first token":
            yield 1
        raise error

    async def ask() -> None:
        async for _ in edge.generate(answer, SimpleNamespace(_dispatch_to_scheduler=sent.append), request()):
            pass

    with pytest.raises(type(error) if by == "after the first token" else (ValueError, OSError)) as raised:
        asyncio.run(ask())
    assert by == "after the first token" or str(raised.value) == said
    assert [said in one.abort_message for one in sent] == ([True] if by == "edge" else [])


@pytest.mark.parametrize("rid", ["\0declined", "\0", "HEALTH_CHECK_1", "", 5, ["a", "\0declined"]])
def test_no_client_has_a_reserved_id(rid: Any) -> None:
    from sglang_tpla.host.requests import edge

    with pytest.raises(edge.RequestRefused, match="rid must be a string"):
        edge.check_rid(rid)


@pytest.mark.parametrize(
    ("status", "method", "refused"),
    [("Up", "GET", ""), ("Starting", "POST", ""), ("Up", "POST", "rid must be"), ("Up", None, "rid must be")],
)
def test_no_client_checks_health_in_the_servers_name(status: str, method: str | None, refused: str) -> None:
    """Such a request has no transfer: decode would answer it from pages that hold somebody else's cache."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    from sglang_tpla.host.requests import edge

    obj = GenerateReqInput(
        rid="HEALTH_CHECK_1", input_ids=[0], sampling_params={}, log_metrics=False,
        bootstrap_host=FAKE_BOOTSTRAP_HOST, bootstrap_room=0,
    )  # fmt: skip

    async def answer(self: Any, obj: Any, _request: Any) -> Any:
        yield 1

    async def ask() -> None:
        manager = SimpleNamespace(server_status=ServerStatus(status), _dispatch_to_scheduler=Mock())
        async for _ in edge.generate(answer, manager, obj, SimpleNamespace(method=method)):
            pass

    if not refused:
        asyncio.run(ask())
        return
    with pytest.raises(edge.RequestRefused, match=refused):
        asyncio.run(ask())


def test_a_request_while_the_server_warms_up_is_checked_but_for_its_transfer() -> None:
    """A client's request looks like the server's own, and one token outside the vocabulary would end the server."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import ServerStatus
    from sglang.srt.sampling.sampling_params import SamplingParams

    from sglang_tpla.host.requests import edge

    manager = SimpleNamespace(
        server_status=ServerStatus.Starting, model_config=SimpleNamespace(vocab_size=100), tokenizer=None,
        preferred_sampling_params=None, sampling_params_class=SamplingParams,
        server_args=SimpleNamespace(
            dp_size=1, speculative_algorithm=None, tokenizer_metrics_allowed_custom_labels=["tenant"]
        ),
    )  # fmt: skip

    def check(token: int, **changes: Any) -> None:
        obj = GenerateReqInput(
            input_ids=[10, token], bootstrap_host=FAKE_BOOTSTRAP_HOST, bootstrap_room=0,
            sampling_params={"max_new_tokens": 8, "temperature": 0}, **changes,
        )  # fmt: skip
        obj.normalize_batch_and_arguments()
        edge.check_normalized(manager, obj, SimpleNamespace(method="POST"))

    check(99, custom_labels={"tenant": "a"})
    assert not edge.limits(manager).seeded
    with pytest.raises(edge.RequestRefused, match="0 to 99"):
        check(100)
    with pytest.raises(edge.RequestRefused, match="custom_labels"):
        check(99, custom_labels={"other": "a"})
    for flag in ({"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}):
        manager.server_args = SimpleNamespace(**vars(manager.server_args) | flag)
        assert edge.limits(manager).seeded


def test_every_field_of_this_release_is_drawn_for_odd_requests() -> None:
    """`tests/e2e/test_requests.py` sends drawn requests to servers, so the fields of a new release are tried there."""
    import msgspec
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    from tests.e2e.odd_requests import NATIVE, SAMPLING

    assert not {field.name for field in dataclasses.fields(GenerateReqInput)} - set(NATIVE)
    assert not {field.name for field in msgspec.structs.fields(SamplingParams)} - set(SAMPLING)


def test_a_clients_abort_of_the_reserved_id_does_nothing() -> None:
    from sglang.srt.managers.io_struct import AbortReq

    from sglang_tpla.host.disaggregation.aborts import abort
    from sglang_tpla.host.requests.declined import DECLINED

    stock = Mock()
    assert abort(stock, SimpleNamespace(), AbortReq(rid=DECLINED)) is None
    assert not stock.mock_calls


def test_messages_that_make_no_prompt_are_told_too() -> None:
    from sglang_tpla.host.requests import edge

    sent: list[Any] = []
    endpoint = SimpleNamespace(tokenizer_manager=SimpleNamespace(_dispatch_to_scheduler=sent.append))

    async def chat() -> None:
        edge.convert(Mock(side_effect=TypeError("no list")), endpoint, request(), None)

    with pytest.raises(edge.RequestRefused, match="wrong value"):
        asyncio.run(chat())
    assert "no list" in sent[0].abort_message


def manager(taken: set[int], **found: Any) -> Any:
    from sglang.srt.disaggregation.utils import DisaggregationMode

    return SimpleNamespace(rooms_taken=taken, disaggregation_mode=DisaggregationMode.PREFILL, agent=Mock(), **found)


@pytest.mark.parametrize("taken", [set(), {5}])
def test_a_room_of_another_request_is_left_alone(taken: set[int]) -> None:
    from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager

    found = manager(taken)
    TplaKVManager.decline(found, 5, "p_1", 8998, "no such LoRA")
    assert found.agent.decline.mock_calls == ([] if taken else [call(5, "no such LoRA")])


@pytest.mark.parametrize("known_to", ["agent", "manager"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_answers_clients_hears_the_reason_first(
    rank: int, known_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's failure fails the request on all ranks, so the other ranks hold theirs back a little."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    from sglang_tpla.host.disaggregation import kv_sender_receiver

    now = [100.0]
    monkeypatch.setattr(kv_sender_receiver.time, "monotonic", lambda: now[0])
    made: Any = kv_sender_receiver._Request()
    agent = Mock(poll=Mock(return_value=KVPoll.WaitingForInput))
    made.kv_mgr = SimpleNamespace(attn_tp_rank=rank, agent=agent, request_status={}, nap_if_idle=lambda room: None)
    made.bootstrap_room, made.conclude_state, made._opened = 7, None, True
    assert made._state() == KVPoll.WaitingForInput
    if known_to == "agent":
        agent.poll.return_value = KVPoll.Failed
    else:  # SGLang's own part failed: the bootstrap server was not found
        made.kv_mgr.request_status[7] = KVPoll.Failed
    assert made._state() == (KVPoll.WaitingForInput if rank else KVPoll.Failed)
    now[0] += kv_sender_receiver.HOLD_BACK_S
    assert made._state() == KVPoll.Failed
