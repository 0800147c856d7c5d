"""A server that speculates: its attention backends, its two pools and their memory, and its refusals.

The reference for attention is a formula over SGLang's page table that knows neither backends nor plans.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_tpla.attention.interface import DecodeShape
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.config import ConfigError
from tests.host.engine_parts import batch_of, cpu_pool, stub_runner
from tests.speculating_model import NEXTN_FILE, copied_layer, with_nextn

HEADS, ROPE, LATENT, WIDTH, CONTEXT, REQUESTS, SLOTS, SCALE = 4, 8, 32, 20, 40, 6, 300, 0.3
GUESSES = 3
TOKENS = GUESSES + 1  # verified at once

pytestmark = pytest.mark.usefixtures("engine")


class Pool:
    def __init__(self, width: int) -> None:
        self.rows = torch.randn(SLOTS, 1, width + ROPE)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.rows

    def set_kv_buffer(self, layer: Any, place: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.rows[place] = k


def resolved_arguments(**values: Any) -> Any:
    """Return a server's arguments as 0.5.17 keeps them, resolved in place."""
    return SimpleNamespace(get_model_config=None, **values)


@pytest.fixture
def runners(engine: None, monkeypatch: pytest.MonkeyPatch) -> dict[bool, Any]:
    """Model runners of the target (False) and of the draft (True), which share a page table."""
    from sglang_tpla.host.attention import backend

    rows = RowFormat.plain((WIDTH,), (WIDTH,), ROPE)
    monkeypatch.setattr(backend, "row_format", lambda *model: rows)
    torch.manual_seed(7)
    slots = torch.randperm(SLOTS - 1)[: REQUESTS * CONTEXT].view(REQUESTS, CONTEXT).to(torch.int32) + 1
    requests = SimpleNamespace(req_to_token=slots, size=REQUESTS)
    found = {}
    for draft, width in ((False, WIDTH), (True, LATENT)):
        found[draft] = stub_runner(
            requests, Pool(width), torch.float32, TOKENS, scaling=SCALE, num_attention_heads=HEADS, kv_lora_rank=width,
            qk_rope_head_dim=ROPE, hf_text_config=SimpleNamespace(kv_lora_rank=LATENT, num_hidden_layers=1),
        )  # fmt: skip
        found[draft].is_draft_worker = draft
    return found


def attend(backend: Any, runner: Any, batch: Any, width: int, starts: list[int], tokens: int) -> None:
    """Run one layer of a forward with ``tokens`` query tokens a request from ``starts`` on, and check its output."""
    table, rows = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool.rows
    requests = batch.req_pool_indices.tolist()
    batch.out_cache_loc = torch.cat([table[r, s : s + tokens] for r, s in zip(requests, starts, strict=True)]).long()
    query, key = (
        torch.randn(len(requests) * tokens, HEADS, width + ROPE),
        torch.randn(len(requests) * tokens, 1, width + ROPE),
    )
    layer = SimpleNamespace(layer_id=0, v_head_dim=width, head_dim=width + ROPE, tp_q_head_num=HEADS)
    out = backend.forward(query, key, key[..., :width], layer, batch)
    for i, (request, start) in enumerate(zip(requests, starts, strict=True)):
        for j in range(tokens):
            past = rows[table[request, : start + j + 1].long(), 0].double()
            assert torch.equal(past[-1], key[i * tokens + j, 0].double())
            weights = (SCALE * (query[i * tokens + j].double() @ past.T)).softmax(-1)
            torch.testing.assert_close(
                out[i * tokens + j].double(), (weights @ past[:, :width]).flatten(), rtol=1e-5, atol=1e-5
            )


CASES = (([3], [1]), ([5, 0, 2], [36, 7, 13]))  # requests, and their tokens before the guesses


@pytest.mark.parametrize(("requests", "lengths"), CASES)
def test_the_target_verifies_every_guess(runners: dict[bool, Any], requests: list[int], lengths: list[int]) -> None:
    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    backend = TplaDecodeBackend(runners[False])
    batch = batch_of("TARGET_VERIFY", requests, lengths)
    backend.init_forward_metadata(batch)
    attend(backend, runners[False], batch, WIDTH, lengths, TOKENS)


def test_the_mask_of_a_step_is_small_and_unread(runners: dict[bool, Any]) -> None:
    from sglang.srt.layers.attention.verify_mask import TreeMaskMode

    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    backend = TplaDecodeBackend(runners[False])
    mask = backend.verify_mask
    assert (mask.mode, mask.is_read, mask.fits(REQUESTS)) == (TreeMaskMode.QLEN_ONLY, False, True)
    assert mask.buffer.numel() == REQUESTS * TOKENS**2
    backend.init_cuda_graph_state(2 * REQUESTS, 2 * REQUESTS * TOKENS)
    assert backend.verify_mask.fits(2 * REQUESTS)
    assert TplaDecodeBackend(runners[True]).verify_mask is None
    runners[False].server_args = resolved_arguments(speculative_algorithm=None)
    assert TplaDecodeBackend(runners[False]).verify_mask is None


@pytest.mark.parametrize(("requests", "lengths"), CASES)
def test_guesses_attend_over_those_before_them(
    runners: dict[bool, Any], requests: list[int], lengths: list[int]
) -> None:
    """Each guess writes a row of the whole latent behind the verified rows, whatever the target's width is."""
    from sglang_tpla.host.attention.draft import DraftSteps

    steps = DraftSteps(runners[True], GUESSES)
    assert len(steps.attn_backends) == GUESSES - 1
    batch = batch_of("DECODE", requests, lengths)
    steps.init_forward_metadata(batch)
    for guess, backend in enumerate(steps.attn_backends):
        attend(backend, runners[True], batch, LATENT, [length + guess for length in lengths], 1)


@pytest.mark.parametrize(("requests", "lengths"), CASES)
def test_the_draft_layer_is_extended_by_what_was_verified(
    runners: dict[bool, Any], requests: list[int], lengths: list[int]
) -> None:
    """SGLang adds all verified tokens to the lengths before the forward."""
    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    backend = TplaDecodeBackend(runners[True])
    batch = batch_of("DRAFT_EXTEND_V2", requests, [length + TOKENS for length in lengths])
    backend.init_forward_metadata(batch)
    attend(backend, runners[True], batch, LATENT, lengths, TOKENS)


def factory(runner: Any, draft: str | None, steps: int = GUESSES) -> Any:
    args = SimpleNamespace(prefill_attention_backend=None, decode_attention_backend=None, attention_backend="tpla")
    return SimpleNamespace(
        server_args=args, draft_attn_backend=draft, draft_model_runner=runner, speculative_num_steps=steps
    )


def test_the_factory_knows_our_backend_and_names_the_others(runners: dict[bool, Any]) -> None:
    from sglang_tpla.host.attention import draft
    from sglang_tpla.host.attention.backend import TplaDecodeBackend

    runner = runners[True]
    runner.attn_backend = TplaDecodeBackend(runner)
    ours = factory(runner, None)
    assert isinstance(draft.guessing_backend(pytest.fail, ours), draft.DraftSteps)
    assert draft.extending_backend(pytest.fail, ours) is runner.attn_backend
    runner.attn_backend = object()  # as on a server that computes prompts with another backend
    assert isinstance(draft.extending_backend(pytest.fail, ours), TplaDecodeBackend)

    stock = SimpleNamespace(attn_backends=[SimpleNamespace(), SimpleNamespace()])
    other = factory(runner, "fa3")
    assert draft.guessing_backend(lambda self: stock, other) is stock
    assert [one.decode_attention_backend_str for one in stock.attn_backends] == ["fa3", "fa3"]
    extend = draft.extending_backend(lambda self: SimpleNamespace(), other)
    assert (extend.prefill_attention_backend_str, extend.decode_attention_backend_str) == ("fa3", "fa3")
    assert draft.guessing_backend(lambda self: None, factory(runner, None, steps=1)) is None


def test_where_a_later_factory_has_its_backends_from(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import runtime_context

    from sglang_tpla.host.attention.draft import chosen

    backends = ("triton", "tpla")
    monkeypatch.setattr(runtime_context, "attention_backends", lambda: backends, raising=False)
    own = SimpleNamespace(draft_attn_backend=None)  # no server_args
    assert (chosen(own, "prefill"), chosen(own, "decode")) == ("triton", "tpla")
    assert chosen(SimpleNamespace(draft_attn_backend="fa3"), "decode") == "fa3"


def test_the_draft_keeps_whole_rows_and_memory_is_counted(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    from sglang_tpla.host.model import draft_model, kv_pool

    widths = (20, 24, 28)
    rows = RowFormat.plain(widths, widths, ROPE)
    monkeypatch.setattr(kv_pool, "artifact", lambda: SimpleNamespace(meta=SimpleNamespace(widths=widths)))
    monkeypatch.setattr(kv_pool, "row_format", lambda *model: rows)
    create, value = MLATokenToKVPool._create_buffers, MLATokenToKVPool.get_value_buffer
    monkeypatch.setattr(MLATokenToKVPool, "_create_buffers", lambda self: kv_pool.create_buffers(create, self))
    monkeypatch.setattr(
        MLATokenToKVPool, "get_value_buffer", lambda self, layer: kv_pool.value_buffer(value, self, layer)
    )

    def built(runner: Any, latent: int, layers: int) -> Any:
        return draft_model.mark_runner(lambda self: cpu_pool(SLOTS, latent, ROPE, layers, torch.float32), runner)

    target = built(SimpleNamespace(is_draft_worker=False), max(widths), len(widths))
    draft = built(SimpleNamespace(is_draft_worker=True), LATENT, 1)
    assert not draft_model.building_draft()
    assert [rows.shape[2] for rows in target.kv_buffer] == [width + ROPE for width in widths]
    assert [rows.shape[2] for rows in draft.kv_buffer] == [LATENT + ROPE]
    assert draft.get_value_buffer(0).shape == (SLOTS + 1, 1, LATENT)

    text = SimpleNamespace(kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, num_nextn_predict_layers=1)
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["DeepseekV3ForCausalLM"]), hf_text_config=text, is_draft_model=False,
        kv_lora_rank=max(widths), qk_rope_head_dim=ROPE, num_hidden_layers=len(widths), dtype=torch.float32,
    )  # fmt: skip
    args = SimpleNamespace(speculative_algorithm="EAGLE")
    mean = kv_pool.mean_cache_dim(
        kv_cache_configurator.calculate_mla_kv_cache_dim, model_config=config, kv_cache_dtype=torch.float32,
        server_args=args,
    )  # fmt: skip
    counted = mean * len(widths) * 4 * (1 + 1 / len(widths))  # as SGLang multiplies it
    row_bytes = sum(buffer[0].nbytes for pool in (target, draft) for buffer in pool.kv_buffer)
    assert counted == pytest.approx(row_bytes)


def test_memory_of_a_draft_beside_rows_of_bytes(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang counts items of one byte, but the draft's items have the model's dtype."""
    from sglang_tpla.cache_rows.sketched import SketchedRows
    from sglang_tpla.host.model import kv_pool

    kinds = [SketchedRows.of(LATENT, 2, shared, ROPE) for shared in (8, 12, 16)]
    monkeypatch.setattr(kv_pool, "row_format", lambda *model: RowFormat.sketched(kinds, 0))
    text = SimpleNamespace(kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, num_nextn_predict_layers=1)
    config = SimpleNamespace(
        hf_text_config=text, is_draft_model=False, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE,
        num_hidden_layers=len(kinds), dtype=torch.float32,
    )  # fmt: skip
    args = SimpleNamespace(speculative_algorithm="EAGLE")
    mean = kv_pool.mean_cache_dim(
        pytest.fail, model_config=config, kv_cache_dtype=torch.float8_e4m3fn, server_args=args
    )
    counted = mean * len(kinds) * (1 + 1 / len(kinds))  # as SGLang multiplies it
    assert counted == pytest.approx(sum(kind.row_bytes for kind in kinds) + (LATENT + ROPE) * 4)


def arguments(**changes: Any) -> Any:
    given = {
        "speculative_algorithm": "EAGLE", "speculative_num_draft_tokens": 4, "speculative_eagle_topk": 1,
        "speculative_num_steps": 3, "speculative_draft_model_path": None, "speculative_adaptive": False,
        "enable_multi_layer_eagle": False, "speculative_use_rejection_sampling": False, "enable_dp_attention": False,
        "kv_cache_dtype": "auto", "disaggregation_decode_enable_radix_cache": False, "model_path": "m", "dp_size": 2,
        "speculative_attention_mode": "decode", "speculative_draft_attention_backend": None, "device": "cpu",
        "enable_custom_logit_processor": False, "speculative_accept_threshold_single": 1.0,
        "speculative_accept_threshold_acc": 1.0, "revision": None, "grammar_backend": None,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speculative_algorithm": "EAGLE3"}, "NextN layer"),
        ({"speculative_algorithm": "NGRAM"}, "use EAGLE or NEXTN"),
        ({"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "other"}, "use EAGLE or NEXTN"),
        ({"speculative_draft_model_path": "other"}, "drop the flag"),
        ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk 1"),
        ({"speculative_num_draft_tokens": 5}, "--speculative-num-steps 3"),
        ({"speculative_num_steps": 4, "speculative_num_draft_tokens": None}, "4 tokens a request at most"),
        ({"speculative_num_steps": 0}, "nothing to verify"),
        ({"speculative_num_steps": -1}, "-1 cannot be served: without a guess"),
        ({"speculative_num_steps": 1}, "--speculative-num-draft-tokens 4 cannot be served: a step verifies its 1"),
        ({"speculative_num_draft_tokens": 2}, "use 4, or drop the flag"),
        ({"speculative_num_steps": 2, "speculative_eagle_topk": 2}, "trees of guesses"),
        ({"enable_custom_logit_processor": True}, "to no token that it verifies"),
        ({"grammar_backend": "outlines"}, "use xgrammar or llguidance"),
        ({"speculative_accept_threshold_acc": 0.5}, "by the target's probability alone"),
        ({"speculative_adaptive": True}, "one number of guesses"),
        ({"enable_multi_layer_eagle": True}, "one layer"),
        ({"speculative_use_rejection_sampling": True}, "do not travel"),
        ({"speculative_use_block_verification": True}, "do not travel"),
        ({"speculative_draft_kv_cache_dtype": "fp8_e4m3"}, "in the model's precision"),
        ({"enable_dp_attention": True}, "--enable-dp-attention with EAGLE cannot be served"),
        ({"attn_dp_size": 2}, "--attn-dp-size with EAGLE cannot be served"),
        ({"disaggregation_decode_enable_radix_cache": True}, "together"),
        ({"speculative_attention_mode": "prefill"}, "--speculative-attention-mode decode"),
    ],
)
def test_what_does_not_work_is_refused(engine: None, changes: dict[str, Any], says: str) -> None:
    from sglang_tpla.host.speculation import unsupported_reasons

    (found,) = unsupported_reasons(arguments(**changes), "decode")
    assert says in found
    assert not unsupported_reasons(arguments(), "decode") and not unsupported_reasons(arguments(), "prefill")
    assert not unsupported_reasons(arguments(**changes | {"speculative_algorithm": None}), "decode")


@pytest.mark.parametrize(("steps", "drafts"), [(1, 2), (2, 3), (3, 4), (None, None), (2, None)])
def test_every_number_of_guesses_is_served(engine: None, steps: int | None, drafts: int | None) -> None:
    from sglang_tpla.host.speculation import unsupported_reasons

    given = arguments(speculative_num_steps=steps, speculative_num_draft_tokens=drafts)
    assert not unsupported_reasons(given, "decode")


def test_prefill_servers_verify_nothing(engine: None) -> None:
    from sglang_tpla.host.speculation import unsupported_reasons

    assert not unsupported_reasons(arguments(speculative_attention_mode="prefill"), "prefill")


@pytest.fixture(scope="module")
def nextn(nano_mla: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its NextN layer."""
    folder = tmp_path_factory.mktemp("nextn")
    return with_nextn(Path(nano_mla), copied_layer(Path(nano_mla), folder / "layer"), folder / "model")


def test_a_checkpoint_without_the_layer_is_refused(engine: None, nano_mla: str, nextn: Path) -> None:
    from sglang_tpla.host.speculation import check_draft

    def check(layers: int | None, model: str = str(nextn), **changes: Any) -> None:
        text = SimpleNamespace(num_nextn_predict_layers=layers, num_hidden_layers=4)
        check_draft(arguments(model_path=model, **changes), text, torch.bfloat16)

    check(1)
    check(None, speculative_algorithm=None)
    for layers in (None, 0, 2):
        with pytest.raises(ConfigError, match="one NextN layer"):
            check(layers)
    with pytest.raises(ConfigError, match=r"has no model\.layers\.4\.eh_proj\.weight, although its config"):
        check(1, nano_mla)  # copies in another precision often lack the layer that their config names


@pytest.mark.parametrize("cache", ["auto", "bf16", "fp8_e4m3"])
@pytest.mark.parametrize("given", [None, "auto", "bf16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_drafts_rows_have_the_dtype_in_which_they_travel(
    engine: None, nextn: Path, cache: str, given: str | None, dtype: torch.dtype
) -> None:
    """All rows of an agent have one dtype; a draft's rows beside sketched ones (fp8_e4m3) have the model's."""
    from sglang_tpla.host.speculation import check_draft

    args = arguments(model_path=str(nextn), kv_cache_dtype=cache, speculative_draft_kv_cache_dtype=given)
    text = SimpleNamespace(num_nextn_predict_layers=1, num_hidden_layers=4)
    # This follows ``configure_kv_cache_dtype`` of ``sglang/srt/mem_cache/kv_cache_dtype.py`` and `keep_precision`.
    draft = {None: torch.bfloat16 if cache == "bf16" else dtype, "auto": dtype}.get(given, torch.bfloat16)
    travels = torch.bfloat16 if cache == "bf16" else dtype
    if draft == travels:
        check_draft(args, text, dtype)
        return
    said = f"--speculative-draft-kv-cache-dtype {given} .* would be {draft}, and travel as {travels}, .*; drop the flag"
    with pytest.raises(ConfigError, match=said):
        check_draft(args, text, dtype)
    check_draft(arguments(**vars(args) | {"speculative_algorithm": None}), text, dtype)


def test_servers_with_other_drafts_are_not_of_one_model(engine: None, nextn: Path, tmp_path: Path) -> None:
    """Every weight of the draft counts on a server that speculates; registration compares the whole identity."""
    from sglang_tpla.host.process import model_identity

    def identity(model: Path, algorithm: str | None) -> str:
        return model_identity(resolved_arguments(model_path=str(model), revision=None, speculative_algorithm=algorithm))

    whole = load_file(nextn / NEXTN_FILE)
    for number, tail in enumerate(("eh_proj", "self_attn.kv_b_proj", "self_attn.kv_a_layernorm")):
        other = shutil.copytree(nextn, tmp_path / str(number))
        name = f"model.layers.4.{tail}.weight"
        save_file({**whole, name: whole[name] + 1}, other / NEXTN_FILE)
        assert identity(other, None) == identity(nextn, None)
        assert identity(other, "EAGLE") != identity(nextn, "EAGLE")
    assert identity(nextn, "EAGLE") == identity(nextn, "NEXTN") != identity(nextn, None)


def test_backends_that_cannot_are_refused(engine: None) -> None:
    from sglang_tpla.host.speculation import check_backends

    draft, hopper = DecodeShape(512, 16), (9, 0)
    few = replace(draft, heads=4)
    check_backends(arguments(), "tpla", [DecodeShape(320, 32)], draft, hopper)
    check_backends(arguments(), "fa3", [], draft, hopper)  # plain MLA: nothing of ours
    check_backends(arguments(speculative_draft_attention_backend="fa3"), "tpla", [], few, hopper)
    with pytest.raises(ConfigError, match="torch_native cannot guess"):
        check_backends(arguments(), "torch_native", [], draft, hopper)
    with pytest.raises(ConfigError, match="torch_native cannot guess"):
        check_backends(arguments(speculative_draft_attention_backend="torch_native"), "tpla", [], draft, hopper)
    with pytest.raises(ConfigError, match="--attention-backend tpla"):
        check_backends(arguments(), "fa3", [DecodeShape(256, 32)], draft, hopper)
    with pytest.raises(ConfigError, match="outside of 8 to 128; use fa3 or flashinfer"):
        check_backends(arguments(), "tpla", [], few, hopper)
    with pytest.raises(ConfigError, match="drop --speculative-algorithm"):
        check_backends(arguments(), "tpla", [], DecodeShape(128, 4, rope_dim=32), hopper)


@pytest.mark.parametrize("draft", [False, True])
def test_a_drafts_cache_keeps_the_models_precision(engine: None, draft: bool) -> None:
    from sglang_tpla.host.model.draft_model import keep_precision

    runner = SimpleNamespace(
        is_draft_worker=draft, dtype=torch.bfloat16, kv_cache_dtype=torch.float8_e4m3fn, kv_cache_dtype_str="fp8_e4m3"
    )
    keep_precision(None, runner)
    kept = (torch.bfloat16, "auto") if draft else (torch.float8_e4m3fn, "fp8_e4m3")
    assert (runner.kv_cache_dtype, runner.kv_cache_dtype_str) == kept
