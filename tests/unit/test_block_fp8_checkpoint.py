"""The block-FP8 checkpoints that the engine's tests serve: their stored tensors, and the values that these encode."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer

from sglang_tpla.reference_model.checkpoint import Checkpoint, dequantise_blocks
from sglang_tpla.reference_model.forward import PlainModel
from tests.block_fp8 import BLOCK, RoundedInputs, convert, quantise_blocks, quantised_weights, round_inputs, spread
from tests.e2e.prompts import source

EXPERT_WIDTH = 512


@pytest.fixture(scope="module")
def converted(nano_mla: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("block_fp8") / "nano"
    convert(Path(nano_mla), target, EXPERT_WIDTH)
    return target


def test_blocks_come_back_within_e4m3() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 200, generator=generator) * torch.logspace(-3, 3, 300)[:, None]
    weight[:BLOCK, BLOCK:] = 0
    codes, scales = quantise_blocks(weight)
    assert codes.shape == weight.shape and codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (3, 2) and scales.dtype == torch.float32
    back = dequantise_blocks(codes, scales, (BLOCK, BLOCK))
    steps = scales.repeat_interleave(BLOCK, 0)[:300].repeat_interleave(BLOCK, 1)[:, :200]
    # Codes have three bits after the leading one, and steps of 2^-9 scales below 2^-6.
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, steps * 2**-10) * 1.0001).all()
    assert torch.equal(quantise_blocks(back)[0].float(), codes.float())


def test_a_spread_expert_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 48, generator=generator, dtype=torch.float64)
    gate, up = (torch.randn(64, 48, generator=generator, dtype=torch.float64) for _ in "gu")
    down = torch.randn(48, 64, generator=generator, dtype=torch.float64)
    wide_gate, wide_up, wide_down = spread(gate, 0, 512), spread(up, 0, 512), spread(down, 1, 512)
    assert wide_gate.shape == (512, 48) and wide_down.shape == (48, 512)
    assert torch.equal(wide_gate[BLOCK : BLOCK + 16], gate[16:32])  # every block has its share
    inner, wide = F.silu(x @ gate.T) * (x @ up.T), F.silu(x @ wide_gate.T) * (x @ wide_up.T)
    torch.testing.assert_close(wide @ wide_down.T, inner @ down.T)
    with pytest.raises(ValueError, match="60 units cannot be spread"):
        spread(torch.ones(60, 2), 0, 1024)


def test_the_checkpoint_is_in_deepseeks_format(nano_mla: str, converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert config["moe_intermediate_size"] == EXPERT_WIDTH
    with safe_open(converted / "model.safetensors", framework="pt") as handle:
        dtypes = {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
    coded = {name for name, dtype in dtypes.items() if dtype == "F8_E4M3"}
    assert {f"{name}_scale_inv" for name in coded} == {name for name in dtypes if name.endswith("_scale_inv")}
    kinds = {name.split(".")[-2] for name in coded}
    assert kinds == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    plain = {name.split(".")[-2] for name in dtypes if name.endswith(".weight") and name not in coded}
    assert {"embed_tokens", "lm_head", "gate"} < plain and not plain & kinds


@torch.no_grad()
def test_the_checkpoint_stands_for_nearly_the_same_model(nano_mla: str, converted: Path) -> None:
    ids = torch.tensor([Tokenizer.from_file(f"{nano_mla}/tokenizer.json").encode(source(5, 600)).ids])
    exact, coded = PlainModel(nano_mla), PlainModel(Checkpoint(converted))
    right, found = (model.forward(ids).log_softmax(-1) for model in (exact, coded))
    with RoundedInputs(quantised_weights(coded)):
        rounded = coded.forward(ids).log_softmax(-1)
    for one, other in ((right, found), (found, rounded)):  # KL in nats a token
        assert 0 < float((one.exp() * (one - other)).sum(-1).mean()) < 0.02


def test_inputs_are_rounded_in_groups_of_a_token() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(7, 2 * BLOCK, generator=generator)
    x[:, BLOCK:] *= 1e-4  # this group has a different scale
    back = round_inputs(x)
    assert ((back - x).abs() <= x.abs().unflatten(-1, (2, BLOCK)).amax(-1).repeat_interleave(BLOCK, 1) / 16).all()
    assert torch.equal(round_inputs(torch.zeros(2, BLOCK)), torch.zeros(2, BLOCK))
