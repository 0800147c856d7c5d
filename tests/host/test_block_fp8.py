"""Block-FP8 weights (DeepSeek's): SGLang's own loading step makes the absorbed weights, then the maps are folded in.

On a CPU the loading step requantises kv_b_proj to one scale a tensor, on a GPU it dequantises to bfloat16. The tests
run both on the same weights, against an independent float32 reference.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.reference_model.checkpoint import dequantise_blocks
from tests.block_fp8 import BLOCK, quantise_blocks

HEADS, NOPE, V, LATENT, WIDTH = 4, 64, 32, 200, 72


@pytest.mark.parametrize(("as_on_a_gpu", "tolerance"), [(False, 0.04), (True, 0.006)], ids=["cpu", "gpu"])
def test_maps_fold_into_block_fp8_weights(
    engine: None, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: bool, tolerance: float
) -> None:
    from sglang.srt.models.deepseek_common import deepseek_weight_loader as loader

    from sglang_tpla.host.model.attention_layer import fold_weights

    post_load = loader.DeepseekV2WeightLoaderMixin.post_load_weights
    original: Any = getattr(post_load, "__wrapped__", post_load)
    monkeypatch.setattr(loader, "_is_cuda", as_on_a_gpu)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(HEADS * (NOPE + V), LATENT, generator=generator)
    weight[:, BLOCK:] *= 5  # blocks of unlike scales
    codes, scales = quantise_blocks(weight)
    stands = dequantise_blocks(codes, scales, (BLOCK, BLOCK))
    a, b = (torch.randn(WIDTH, LATENT, generator=generator) for _ in "ab")

    attention = torch.nn.Module()
    attention.kv_b_proj = torch.nn.Module()
    attention.kv_b_proj.weight = torch.nn.Parameter(codes, requires_grad=False)
    attention.kv_b_proj.weight_scale_inv = torch.nn.Parameter(scales, requires_grad=False)
    attention.kv_b_proj.weight_scale_inv.format_ue8m0 = False
    attention.qk_nope_head_dim, attention.v_head_dim = NOPE, V
    attention.w_kc = attention.w_vc = attention.w_scale = None
    attention.tpla = SimpleNamespace(key_map=a, value_map=b)
    layer = torch.nn.Module()
    layer.self_attn = attention
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer])
    model.start_layer, model.end_layer = 0, 1
    whole = torch.nn.Module()
    whole.model = model
    whole.quant_config = SimpleNamespace(weight_block_size=[BLOCK, BLOCK], get_name=lambda: "fp8")
    whole.config = SimpleNamespace(num_hidden_layers=1, architectures=["DeepseekV3ForCausalLM"])

    fold_weights(original, whole)
    kc, vc = stands.view(HEADS, NOPE + V, LATENT).split([NOPE, V], dim=1)
    for found, right in ((attention.w_kc, kc @ a.T), (attention.w_vc, b @ vc.transpose(1, 2))):
        assert found.dtype == torch.bfloat16 and found.shape == right.shape
        assert (found.float() - right).norm() <= tolerance * right.norm()
    addresses = attention.w_kc.data_ptr(), attention.w_vc.data_ptr()
    before = attention.w_kc.clone()
    fold_weights(original, whole)  # a reload writes into the tensors that captured graphs hold
    assert (attention.w_kc.data_ptr(), attention.w_vc.data_ptr()) == addresses
    assert torch.equal(attention.w_kc, before)


def test_head_shards_that_end_inside_a_block_are_refused(engine: None) -> None:
    from sglang_tpla.config import ConfigError, Layout
    from sglang_tpla.host.validation import check_blocks

    v3 = SimpleNamespace(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for ranks, groups in ((8, 2), (16, 1), (64, 1), (8, 8)):
        check_blocks(v3, blocks, Layout(ranks, groups, 128))
    with pytest.raises(ConfigError, match=r"q_b_proj has 1 heads of 192 = 192 values.*fewer head shards than 128"):
        check_blocks(v3, blocks, Layout(256, 2, 128))
    narrow = SimpleNamespace(qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=32)
    with pytest.raises(ConfigError, match="o_proj has 2 heads of 32 = 64 values"):
        check_blocks(narrow, blocks, Layout(8, 2, 8))
    check_blocks(narrow, None, Layout(8, 2, 8))
    check_blocks(narrow, blocks, Layout(4, 4, 8))  # one head shard is not cut
