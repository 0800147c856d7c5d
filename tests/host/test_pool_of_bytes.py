"""SGLang's own latent pool with rows in bytes: sizes, memory accounting, and the pool of a transfer agent."""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.cache_rows.sketched import SketchedRows
from tests.host.engine_parts import cpu_pool

LAYERS, LATENT, ROPE, SLOTS = 3, 128, 32, 40


@pytest.fixture
def hooks(engine: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pool's hooks around SGLang's functions, with an artifact of mixed widths (or none: ``artifact`` is None)."""
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    from sglang_tpla.host.model import kv_pool as pool
    from sglang_tpla.host.model import rows

    state = SimpleNamespace(artifact=None, rows=None)
    for module in (pool, rows):
        monkeypatch.setattr(module, "artifact", lambda: state.artifact)
    monkeypatch.setattr(rows, "settings", lambda: SimpleNamespace(rows=state.rows, artifact="a file"))
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


def artifact_of(widths: tuple[int, ...], sketched: Sequence[SketchedRows] = ()) -> Any:
    """The part of an artifact that the hooks read."""
    return SimpleNamespace(
        meta=SimpleNamespace(
            widths=widths, shared_dims=(16,) * len(widths), sketched=bool(sketched), rows=lambda layer: sketched[layer]
        )
    )


def accounted(state: Any, dtype: torch.dtype, latent: int) -> float:
    """Return the bytes of a token in all layers, by SGLang's memory accounting."""
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["DeepseekV3ForCausalLM"]),
        kv_lora_rank=latent, qk_rope_head_dim=ROPE, num_hidden_layers=LAYERS,
    )  # fmt: skip
    dim = state.cache_dim(model_config=config, kv_cache_dtype=dtype, **state.more)
    return dim * LAYERS * dtype.itemsize


def test_plain_rows_stay_sglangs(hooks: Any) -> None:
    pool = cpu_pool(SLOTS, LATENT, ROPE, LAYERS, torch.float32)
    assert [tuple(buffer.shape) for buffer in pool.kv_buffer] == [(SLOTS + 1, 1, LATENT + ROPE)] * LAYERS
    assert accounted(hooks, torch.float32, LATENT) == LAYERS * 4 * (LATENT + ROPE)


@pytest.mark.parametrize("with_artifact", [False, True], ids=["one group", "two groups, layers of two kinds"])
def test_rows_and_accounting(hooks: Any, with_artifact: bool) -> None:
    """SGLang's pool, its memory accounting and the transfer agent's pool have rows of the same bytes."""
    from sglang_tpla.host.disaggregation.engine_memory import cache_pool
    from sglang_tpla.host.model.rows import row_format

    kinds = [SketchedRows.of(LATENT, 1, LATENT, ROPE)] * LAYERS
    sizes = [200] * LAYERS  # 128 + 2 * 32 + 8
    if with_artifact:
        kinds = [SketchedRows.of(LATENT, 2, 32, ROPE, sketch_bits=bits) for bits in (4, 2, 4)]
        # 80 + 64 + 24 or 12 + 8
        hooks.artifact, sizes = (artifact_of((80,) * LAYERS, kinds), [176, 164, 176])
    else:
        hooks.rows = "sketched"
    dtype = torch.float8_e4m3fn
    pool = cpu_pool(SLOTS, LATENT, ROPE, LAYERS, dtype)
    assert [tuple(buffer.shape) for buffer in pool.kv_buffer] == [(SLOTS + 1, 1, size) for size in sizes]
    assert accounted(hooks, dtype, LATENT) == sum(sizes)
    assert pool.get_kv_size_bytes() == sum(sizes) * (SLOTS + 1)
    with pytest.raises(TypeError, match="--attention-backend tpla"):
        pool.get_value_buffer(0)
    found = row_format(LATENT, ROPE, LAYERS, int(with_artifact))
    assert [rows.rows for rows in found.layers] == kinds  # type: ignore[attr-defined]
    pointers, nbytes, items = pool.get_contiguous_buf_infos()
    text = SimpleNamespace(kv_lora_rank=LATENT, qk_rope_head_dim=ROPE)
    seen = cache_pool(
        SimpleNamespace(
            state_types=[], kv_cache_dtype_str="fp8_e4m3", gpu_id=0, page_size=1,
            kv_data_ptrs=pointers, kv_data_lens=nbytes, kv_item_lens=items,
        ),
        SimpleNamespace(device="cpu", get_model_config=lambda: SimpleNamespace(hf_text_config=text)),
        found,
    )  # fmt: skip
    assert seen.row_format == found
    seen.layers[1][7] = torch.arange(sizes[1], dtype=torch.uint8)
    assert pool.get_key_buffer(1).view(torch.uint8)[7, 0].tolist() == list(range(sizes[1]))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_a_cache_of_one_byte_values_is_not_transferred(imported: None, name: str) -> None:
    """A checkpoint can make SGLang choose such a cache without any flag."""
    from sglang_tpla.config import ConfigError
    from sglang_tpla.host.disaggregation.engine_memory import cache_dtype

    with pytest.raises(ConfigError, match=f"a cache of {name} is not transferred.*--tpla-rows sketched on decode"):
        cache_dtype(SimpleNamespace(kv_cache_dtype_str=name), None)


def test_rows_that_contradict_the_artifact(hooks: Any) -> None:
    from sglang_tpla.config import ConfigError
    from sglang_tpla.host.model.rows import sketched

    hooks.artifact, hooks.rows = artifact_of((80,) * LAYERS), "sketched"
    with pytest.raises(ConfigError, match="sketched does not go with a file, which was made for plain rows"):
        sketched()
