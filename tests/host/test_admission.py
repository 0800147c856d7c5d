"""Requests that a scheduler cannot serve are answered before they are queued; grammars mask logits on a CPU."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytestmark = pytest.mark.usefixtures("imported")


def scheduler(mode: str) -> SimpleNamespace:
    from sglang.srt.disaggregation.utils import DisaggregationMode

    table = {"p_1:8998": SimpleNamespace(dp_size=2)}
    queue = SimpleNamespace(kv_manager=Mock(prefill_info_table=table))
    return SimpleNamespace(
        disaggregation_mode=DisaggregationMode(mode), disagg_decode_prealloc_queue=queue,
        disagg_prefill_bootstrap_queue=queue, output_streamer=Mock(), ipc_channels=Mock(),
        abort_on_priority_when_disabled=True, enable_priority_scheduling=False,
        server_args=SimpleNamespace(enable_return_routed_experts=True),
    )  # fmt: skip


def request(tokens: int, to_finish: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        origin_input_ids=[1] * tokens, to_finish=to_finish, finished_reason=None, return_logprob=False, rid="a",
        disagg_prefill_dp_rank=None, bootstrap_host="p_1", bootstrap_port=8998,
        bootstrap_room=5, grammar=None, vocab_size=3, priority=None, return_routed_experts=False,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("flag", ["abort_on_priority_when_disabled", "enable_priority_scheduling", None])
def test_a_priority_that_only_one_server_refuses(mode: str, flag: str | None) -> None:
    from sglang_tpla.host.requests.admission import admit

    server, req, queue = scheduler(mode), request(5), Mock()
    req.priority = 7
    if flag:
        setattr(server, flag, flag == "enable_priority_scheduling")
    admit(queue, server, req)
    assert queue.called is (flag is not None)
    assert queue.called or "priority is disabled" in req.finished_reason.message
    assert server.disagg_decode_prealloc_queue.kv_manager.decline.called is (flag is None)


@pytest.mark.parametrize(("start", "mode", "queued"), [(0, "decode", False), (5, "decode", True), (0, "prefill", True)])
def test_experts_of_a_prompt_that_prefill_computed(start: int, mode: str, queued: bool) -> None:
    from sglang_tpla.host.requests.admission import admit

    req, queue = request(5), Mock()
    req.return_routed_experts, req.routed_experts_start_len = True, start
    admit(queue, scheduler(mode), req)
    assert queue.called is queued
    assert queued or "routed_experts_start_len must be 5" in req.finished_reason.message


@pytest.mark.parametrize(("rank", "queued"), [(1, True), (2, False), (None, True)])
def test_a_prefill_rank_that_there_is_not(rank: int | None, queued: bool) -> None:
    from sglang_tpla.host.requests.admission import admit

    req, queue = request(5), Mock()
    req.disagg_prefill_dp_rank = rank
    admit(queue, scheduler("decode"), req)
    assert queue.called is queued
    assert queued or "must lie in 0...1 for the prefill server p_1:8998; got 2" in req.finished_reason.message


def test_retracted_requests_were_admitted_before() -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    from sglang_tpla.host.requests.admission import admit

    queue = Mock()
    admit(queue, scheduler("decode"), request(9, FINISH_ABORT("gone")), is_retracted=True)
    assert queue.called


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_what_sglang_refuses_gets_no_room(mode: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    from sglang_tpla.host.requests.admission import admit

    server, queue = scheduler(mode), Mock()
    req = request(1, FINISH_ABORT("Input length exceeds", 400, "BadRequestError"))
    admit(queue, server, req)
    assert not queue.called and req.finished_reason.message == "Input length exceeds"
    server.output_streamer.stream_output.assert_called_once_with([req], False)
    decline = server.disagg_decode_prealloc_queue.kv_manager.decline
    decline.assert_called_once_with(5, "p_1", 8998, f"the {mode} server refused the request: Input length exceeds")


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_long_prompt_is_not_told_of_a_flag_that_is_refused_at_start(mode: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from sglang.srt.managers.utils import validate_input_length

    from sglang_tpla.host.requests.admission import admit

    server, req = scheduler(mode), request(9)
    req.to_finish = FINISH_ABORT(validate_input_length(req, 8, allow_auto_truncate=False))
    assert "--allow-auto-truncate" in req.to_finish.message
    admit(Mock(), server, req)
    assert req.finished_reason.message.endswith("allowed length (8 tokens). Use a shorter input.")
    (_, _, _, told), _ = server.disagg_decode_prealloc_queue.kv_manager.decline.call_args
    assert told.endswith("Use a shorter input.")


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(("rule", "queued"), [('"a"', True), ('""', True), ("root", False)])
def test_a_grammar_that_allows_no_token(mode: str, rule: str, queued: bool) -> None:
    import xgrammar

    from sglang_tpla.host.requests.admission import admit

    tokens = xgrammar.TokenizerInfo(["a", "b", "end"], stop_token_ids=[2])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(tokens).compile_grammar(f"root ::= {rule}"))
    req, queue = request(5), Mock()
    req.grammar = SimpleNamespace(
        allocate_vocab_mask=lambda vocab, rows, device: xgrammar.allocate_token_bitmask(rows, vocab),
        fill_vocab_mask=matcher.fill_next_token_bitmask,
    )
    admit(queue, scheduler(mode), req)
    assert queue.called is queued
    assert queued or "allows no token to begin with" in req.finished_reason.message
    assert queued or req.finished_reason.status_code == 400


def test_an_idle_scheduler_says_so_to_its_agent() -> None:
    from sglang_tpla.host.requests.admission import note_idle

    server = scheduler("prefill")
    note_idle(server)
    server.disagg_prefill_bootstrap_queue.kv_manager.agent.note_idle.assert_called_once_with()


def test_an_error_over_one_request_is_that_requests() -> None:
    from sglang_tpla.host.requests.admission import handle

    server, req = scheduler("decode"), SimpleNamespace(rid="a")
    handle(Mock(side_effect=ZeroDivisionError("by nothing")), server, req)
    (said, to), _ = server.ipc_channels.send_to_tokenizer.send_output.call_args
    assert to is req and said.rid == "a" and said.finished_reason["status_code"] == 400
    assert "ZeroDivisionError: by nothing" in said.finished_reason["message"]


def test_grammar_masks_on_a_cpu() -> None:
    from sglang_tpla.host.cpu import grammar

    bits = grammar.bitmask(vocab_size=40, batch_size=2)
    assert bits.shape == (2, 2) and not bits.is_pinned()
    bits[0, 0], bits[0, 1] = 0b101, 0
    for apply in (lambda logits: grammar.mask(None, logits, bits), lambda logits: grammar.mask_batch(logits, bits)):
        logits = torch.zeros(2, 40)
        apply(logits)
        allowed = (logits == 0).nonzero().tolist()
        assert allowed == [[0, 0], [0, 2], *([1, i] for i in range(40))]
