"""The compat module gives the same answers in every release; and the traps that no signature shows."""

from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.host import compat, ledger

LATER = ledger.host_version() != "0.5.17"


def test_arguments_as_resolved(engine: None, nano_mla: str) -> None:
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path=nano_mla, device="cpu", dtype="float32")
    if hasattr(args, "resolve_once"):
        assert not compat.is_resolved(args)
        args.resolve_once()
        assert compat.is_resolved(args)
    assert compat.decode_backend_name(args) == "torch_native"
    assert compat.resolved(args).attention_backend == "torch_native"
    assert compat.model_config(args).kv_lora_rank == compat.model_config(compat.resolved(args)).kv_lora_rank == 128


@pytest.mark.parametrize(
    ("fields", "groups", "ranks"),
    [
        ({"dp_size": 1}, 1, 1),
        ({"dp_size": 2, "enable_dp_attention": True}, 2, 2),
        ({"dp_size": 1, "enable_dp_attention": False, "attn_dp_size": 4}, 4, 4),
        ({"dp_size": 2, "enable_dp_attention": False, "attn_dp_size": 1}, 1, 2),
        ({"dp_size": 3, "attn_dp_size": None}, 1, 3),
    ],
)
def test_attention_groups_in_either_spelling(fields: dict[str, Any], groups: int, ranks: int) -> None:
    args = SimpleNamespace(**fields)
    assert compat.attention_groups(args) == groups
    assert compat.data_parallel_ranks(args) == ranks


def test_layers_are_built_for_a_share(engine: None) -> None:
    """Layers are built for rank 1 of 3 in a process that is one of one, and everything is as before afterwards."""
    from sglang.srt.layers.linear import ColumnParallelLinear
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    before = (parallel.attn_tp_rank, parallel.attn_tp_size)
    with compat.attention_rank(1, 3):
        assert (parallel.attn_tp_rank, parallel.attn_tp_size) == (1, 3)
        part = ColumnParallelLinear(4, 6, bias=False, **compat.attention_share())
    assert (parallel.attn_tp_rank, parallel.attn_tp_size) == before == (0, 1)
    whole = torch.arange(24.0).view(6, 4)
    part.weight.weight_loader(part.weight, whole)
    assert torch.equal(part.weight.data, whole[2:4])
    with pytest.raises(RuntimeError, match="on purpose"), compat.attention_rank(1, 3):
        raise RuntimeError("on purpose")
    assert (parallel.attn_tp_rank, parallel.attn_tp_size) == before


def test_both_names_of_deepgemm_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in compat.DEEPGEMM_BMM:
        assert not compat.uses_deepgemm_bmm()
        monkeypatch.setenv(name, "1")
        assert compat.uses_deepgemm_bmm()
        monkeypatch.delenv(name)


def test_the_page_table_is_read_to_the_end_of_the_replay(engine: None) -> None:
    """Every layer's kernel reads the page table, so the scheduler must not write it before the last layer has run."""
    from sglang.srt.layers.attention import base_attn_backend

    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    backend = TplaDecodeBackend.__new__(TplaDecodeBackend)
    said = backend.shared_read_ends(SimpleNamespace(is_decode=lambda: True, is_target_verify=lambda: False))
    if LATER:
        assert said is base_attn_backend.SharedReadEnds.POST_REPLAY
    else:
        assert said is None and not hasattr(base_attn_backend, "SharedReadEnds")


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("enable_kv_cache_sharding", True, "--enable-kv-cache-sharding"),
        ("disaggregation_decode_allocation_policy", "prefill_complete", "prefill_complete"),
        ("disaggregation_enable_kv_checksum", True, "--disaggregation-enable-kv-checksum"),
        ("enable_page_major_kv_layout", True, "--enable-page-major-kv-layout"),
        ("enable_unified_memory", True, "--enable-unified-memory"),
        ("enable_pd_role_switch", True, "--enable-pd-role-switch"),
        ("disaggregation_decode_retraction_backup", "host_pool", "--disaggregation-decode-retraction-backup host_pool"),
        ("enable_unified_cache_external_linker", True, "--enable-unified-cache-external-linker"),
    ],
)
def test_what_moves_rows_elsewhere_is_refused(field: str, value: Any, flag: str) -> None:
    from sglang_tpla.host.validation import newer_refusals

    args = make_dataclass("Args", [("speculative_algorithm", str, None)])()
    args.disaggregation_decode_retraction_backup = "cpu_tensor"
    assert not any(bad for bad, _, _ in newer_refusals(args))
    setattr(args, field, value)
    (refused,) = [name for bad, name, _ in newer_refusals(args) if bad]
    assert flag in refused


@pytest.mark.parametrize("never", [0.0, 1.0])
def test_rows_received_into_host_memory_are_refused(never: float) -> None:
    """The threshold that means never was 0, and is 1 from 0.5.22 on."""
    from sglang_tpla.host.validation import newer_refusals

    args = make_dataclass("Args", [("disaggregation_decode_host_receive_threshold", float, never)])()
    assert not any(bad for bad, _, _ in newer_refusals(args))
    args.disaggregation_decode_host_receive_threshold = 0.5
    (refused,) = [name for bad, name, _ in newer_refusals(args) if bad]
    assert refused == "--disaggregation-decode-host-receive-threshold 0.5"


def test_defaults_of_server_arguments() -> None:
    from sglang.srt.server_args import ServerArgs

    expected = 1.0 if ledger.host_version() == "0.5.23" else None
    assert compat.default_of(ServerArgs, "disaggregation_decode_host_receive_threshold") == expected
    assert compat.default_of(ServerArgs, "tp_size") == 1


def test_the_rust_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Rust server's bootstrap server would take registrations from anyone."""
    from sglang_tpla.host.validation import unchecked_ways_in

    args = SimpleNamespace(tokenizer_worker_num=1, grpc_mode=False, smg_grpc_mode=False)
    assert not any(bad for bad, _, _ in unchecked_ways_in(args))
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    (refused,) = [name for bad, name, _ in unchecked_ways_in(args) if bad]
    assert refused == "SGLANG_RUST_SERVER=1"


@pytest.mark.parametrize("fields", [{"dp_size": 2, "enable_dp_attention": True}, {"dp_size": 1, "attn_dp_size": 2}])
def test_attention_groups_are_refused_where_a_cpu_cannot_run_them(fields: dict[str, Any]) -> None:
    """Either name of the flag is refused with the reason; a server on GPUs may have attention groups."""
    from sglang_tpla.host.validation import attention_groups_refusal

    args = SimpleNamespace(**{"enable_dp_attention": False, "device": "cpu", **fields})
    bad, flag, why = attention_groups_refusal(args)
    assert bad == (not compat.cpu_has_attention_groups()) == (ledger.host_version() == "0.5.17")
    assert "pins memory" in why and "0.5.19" in why
    assert flag == ("--enable-dp-attention" if args.enable_dp_attention else "--attn-dp-size")
    assert not attention_groups_refusal(SimpleNamespace(**{**vars(args), "device": "cuda"}))[0]
    one = SimpleNamespace(dp_size=1, enable_dp_attention=False, attn_dp_size=1, device="cpu")
    assert not attention_groups_refusal(one)[0]


def test_arguments_that_came_resolved_are_not_checked_again() -> None:
    """A child process unpickles a resolved record, and must not resolve and check the record again."""
    from sglang_tpla.host.validation import check_server_args

    calls: list[Any] = []
    args = SimpleNamespace(_resolution_finished=True)  # any check would fail on this record
    check_server_args(calls.append, args)
    assert calls == [args]


def test_rows_in_host_memory_fail_their_request() -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    from sglang_tpla.host.disaggregation.kv_sender_receiver import TplaKVReceiver

    receiver = TplaKVReceiver.__new__(TplaKVReceiver)
    receiver.bootstrap_room, receiver.conclude_state = 7, None
    receiver.send_metadata(torch.zeros(1).numpy(), destination=SimpleNamespace(name="HOST"))
    assert receiver.conclude_state == KVPoll.Failed and "device's pool" in str(receiver._reason)


def test_an_aborted_room_leaves_nothing_under_its_number() -> None:
    """Later releases keep a failed room's number failed, so the next request in that room would fail as well."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    from sglang_tpla.host.disaggregation.kv_sender_receiver import TplaKVSender

    manager = SimpleNamespace(
        request_status={7: KVPoll.Bootstrapping}, req_to_decode_prefix_len={}, transfer_infos={}, failure_records={},
        deferred_bootstrap=None, _maybe_ack_drained_abort=lambda room: None, _staging_ctx=None,
    )  # fmt: skip
    sender = TplaKVSender.__new__(TplaKVSender)
    sender.kv_mgr, sender.bootstrap_room, sender.conclude_state = manager, 7, None
    sender.abort()
    assert not manager.request_status and not manager.failure_records
    assert sender.conclude_state == KVPoll.Failed and sender._reason == "Aborted by AbortReq."
    manager.request_status[7] = KVPoll.Bootstrapping  # the next request has the number
    sender.clear()
    assert manager.request_status == {7: KVPoll.Bootstrapping}
