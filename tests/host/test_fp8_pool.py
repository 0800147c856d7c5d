"""SGLang's own latent pool with FP8 rows: its bytes, what it accounts for, and what it hands to a transfer agent."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

LAYERS, LATENT, ROPE, SLOTS = 3, 128, 32, 40


@pytest.fixture
def fp8_hooks(engine: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pool's hooks around SGLang's functions, with an artifact of mixed widths (or none: ``artifact`` is None)."""
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    from sglang_tpla.host.model import kv_pool as pool

    state = SimpleNamespace(artifact=None)
    monkeypatch.setattr(pool, "artifact", lambda: state.artifact)
    create, value = MLATokenToKVPool._create_buffers, MLATokenToKVPool.get_value_buffer
    dim = kv_cache_configurator.calculate_mla_kv_cache_dim
    monkeypatch.setattr(MLATokenToKVPool, "_create_buffers", lambda self: pool.create_buffers(create, self))
    monkeypatch.setattr(
        MLATokenToKVPool, "get_value_buffer", lambda self, layer_id: pool.value_buffer(value, self, layer_id)
    )
    older = "server_args" in inspect.signature(dim).parameters
    state.more = {"server_args": None} if older else {}
    state.cache_dim = lambda **kwargs: pool.mean_cache_dim(dim, **kwargs)
    return state


def make_pool(dtype: torch.dtype, latent: int) -> Any:
    from sglang_tpla.host.cpu.pool import CpuLatentPool

    return CpuLatentPool(
        SLOTS, page_size=1, dtype=dtype, kv_lora_rank=latent, qk_rope_head_dim=ROPE, layer_num=LAYERS,
        device="cpu", enable_memory_saver=False, start_layer=0, end_layer=LAYERS - 1,
    )  # fmt: skip


def accounted(state: Any, dtype: torch.dtype, latent: int) -> float:
    """Bytes a token of all layers, as SGLang's memory accounting takes them."""
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["DeepseekV3ForCausalLM"]),
        kv_lora_rank=latent, qk_rope_head_dim=ROPE, num_hidden_layers=LAYERS,
    )  # fmt: skip
    dim = state.cache_dim(model_config=config, kv_cache_dtype=dtype, **state.more)
    return dim * LAYERS * dtype.itemsize


@pytest.mark.parametrize("widths", [None, (80, 80, 80), (112, 96, 128)])
def test_rows_and_accounting(fp8_hooks: Any, widths: tuple[int, ...] | None) -> None:
    from sglang_tpla.cache_rows.row_format import RowFormat
    from sglang_tpla.host.disaggregation.engine_memory import cache_pool

    kept = widths or (LATENT,) * LAYERS
    if widths:
        fp8_hooks.artifact = SimpleNamespace(meta=SimpleNamespace(widths=widths))
    dtype = torch.float8_e4m3fn
    pool = make_pool(dtype, max(kept))
    rows = [w + 2 * ROPE + 16 for w in kept]
    assert [tuple(buffer.shape) for buffer in pool.kv_buffer] == [(SLOTS + 1, 1, row) for row in rows]
    assert accounted(fp8_hooks, dtype, max(kept)) == sum(rows)
    assert pool.get_kv_size_bytes() == sum(rows) * (SLOTS + 1)
    with pytest.raises(TypeError, match="--attention-backend tpla"):
        pool.get_value_buffer(0)
    pointers, sizes, items = pool.get_contiguous_buf_infos()
    text = SimpleNamespace(kv_lora_rank=LATENT, qk_rope_head_dim=ROPE)
    seen = cache_pool(
        SimpleNamespace(
            state_types=[], kv_cache_dtype_str="fp8_e4m3", gpu_id=0, page_size=1,
            kv_data_ptrs=pointers, kv_data_lens=sizes, kv_item_lens=items,
        ),
        SimpleNamespace(device="cpu", get_model_config=lambda: SimpleNamespace(hf_text_config=text)),
    )  # fmt: skip
    assert seen.row_format is RowFormat.FP8 and seen.widths == kept
    seen.layers[1][7] = torch.arange(rows[1], dtype=torch.uint8)
    assert pool.get_key_buffer(1).view(torch.uint8)[7, 0].tolist() == [n % 256 for n in range(rows[1])]


def test_more_tokens_fit(fp8_hooks: Any) -> None:
    """DeepSeek's 512 + 64 at g = 2 with r = 128: FP8 rows against bfloat16 ones."""
    fp8_hooks.artifact = SimpleNamespace(meta=SimpleNamespace(widths=(320,) * LAYERS))
    rows = [accounted(fp8_hooks, dtype, 320) for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    assert [row / LAYERS for row in rows] == [2 * (320 + ROPE), 320 + 2 * ROPE + 16]


def test_plain_rows_stay_sglangs(fp8_hooks: Any) -> None:
    pool = make_pool(torch.float32, LATENT)
    assert [tuple(buffer.shape) for buffer in pool.kv_buffer] == [(SLOTS + 1, 1, LATENT + ROPE)] * LAYERS
    assert accounted(fp8_hooks, torch.float32, LATENT) == LAYERS * 4 * (LATENT + ROPE)
