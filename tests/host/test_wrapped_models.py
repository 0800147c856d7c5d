"""Models whose language model is wrapped: SGLang's own classes are hooked, loaded, folded and observed.

``tests/e2e/test_models.py`` runs these models in real servers.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.artifact.fold import fold_key_map, fold_value_map
from tests.host.layer_artifacts import OneGroup
from tests.random_checkpoint import CONFIGS, draw_weights

WIDTH = 24
TINY_VISION = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}


def kimi_vl() -> tuple[torch.nn.Module, str, dict[str, Any]]:
    from sglang.srt.configs.kimi_vl import KimiVLConfig
    from sglang.srt.models.kimi_vl import KimiVLForConditionalGeneration

    inner = CONFIGS["deepseek-v2"]
    config = KimiVLConfig(vision_config=dict(TINY_VISION), text_config=dict(inner))
    config.encoder_only = config.language_only = False
    return KimiVLForConditionalGeneration(config), "language_model.", inner


def kimi_k25() -> tuple[torch.nn.Module, str, dict[str, Any]]:
    from sglang.srt.configs.kimi_k25 import KimiK25Config
    from sglang.srt.models.kimi_k25 import KimiK25ForConditionalGeneration

    inner = CONFIGS["kimi-k2"]
    vision = {
        **TINY_VISION, "text_hidden_size": 128, "mm_hidden_size": 32, "vt_hidden_size": 32,
    }  # fmt: skip
    config = KimiK25Config(vision_config=vision, text_config=dict(inner))
    config.encoder_only = config.language_only = False
    return KimiK25ForConditionalGeneration(config), "language_model.", inner


def deepseek_vl2() -> tuple[torch.nn.Module, str, dict[str, Any]]:
    from sglang.srt.configs.deepseekvl2 import DeepseekVL2Config
    from sglang.srt.models.deepseek_vl2 import DeepseekVL2ForCausalLM

    class WithoutVision(DeepseekVL2ForCausalLM):
        """The model without its encoder, which always has 400 million parameters."""

        def _init_vision_module(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
            return torch.nn.Identity()

    inner = {**CONFIGS["deepseek-v2"], "use_mla": True}
    projector = {"projector_type": "linear", "input_dim": 8, "n_embed": 128}
    config = DeepseekVL2Config(tile_tag="2D", language_config=dict(inner), projector_config=projector)
    return WithoutVision(config), "language.", inner


WRAPPED = pytest.mark.parametrize("make", [kimi_vl, kimi_k25, deepseek_vl2])
QUIET = pytest.mark.filterwarnings("ignore")  # SGLang's own imports warn on a CPU


@WRAPPED
@QUIET
def test_the_language_model_is_hooked(engine: None, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_tpla.config import Layout
    from sglang_tpla.host.model import attention_layer as layer
    from sglang_tpla.host.process import Slice

    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(*shape, generator=generator) / 8 for shape in ((64, WIDTH), (WIDTH, 64), (WIDTH, 64))]
    part = Slice(Layout(1, 1, 4), 0, OneGroup([maps]))  # type: ignore[arg-type]
    monkeypatch.setattr(layer, "make_slice", lambda heads, rank, size: part)
    monkeypatch.setattr(layer, "settings", lambda: SimpleNamespace(o_proj="replicate"))
    model, prefix, inner = make()
    weights = draw_weights(inner)
    model.load_weights((prefix + name, tensor) for name, tensor in weights.items())
    _, a, b = maps
    for index, block in enumerate(model.language_model.model.layers):
        attention = block.self_attn
        whole = weights[f"model.layers.{index}.self_attn.kv_b_proj.weight"].float().view(4, 64, 64)
        assert attention.tpla_width == WIDTH and attention.attn_mqa.v_head_dim == WIDTH
        torch.testing.assert_close(attention.w_kc.float(), fold_key_map(whole[:, :32], a, 1.0), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(
            attention.w_vc.float(), fold_value_map(whole[:, 32:].transpose(1, 2), b, 1.0), rtol=2e-2, atol=2e-2
        )


@WRAPPED
@QUIET
def test_statistics_of_a_wrapped_model(
    engine: None, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_tpla.host import statistics_collector
    from sglang_tpla.host.model import attention_layer as layer
    from sglang_tpla.measure.statistics import Statistics

    monkeypatch.setattr(layer, "make_slice", lambda heads, rank, size: None)  # as on a prefill server
    model, prefix, inner = make()
    model.load_weights((prefix + name, tensor) for name, tensor in draw_weights(inner).items())
    monkeypatch.setattr(statistics_collector, "model_identity", lambda args: "config:weights")
    monkeypatch.setattr(
        statistics_collector,
        "settings",
        lambda: SimpleNamespace(statistics_folder=str(tmp_path), statistics_every_tokens=1),
    )
    runner = SimpleNamespace(
        model=model, device="cpu",
        server_args=SimpleNamespace(model_path="/m/wrapped", port=1, get_model_config=lambda: None),
    )  # fmt: skip
    statistics_collector.observe_model(None, runner)
    for block in model.language_model.model.layers:
        attention = block.self_attn
        queries = attention.q_b_proj if attention.q_lora_rank else attention.q_proj
        attention.kv_a_layernorm(torch.randn(5, 64))
        queries(torch.randn(5, attention.q_lora_rank or 128))
    (file,) = tmp_path.iterdir()
    assert len(Statistics.load(file).layers) == 3
