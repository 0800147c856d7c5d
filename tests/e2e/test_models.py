"""Every served family by a small random checkpoint, through real servers, against the plain model.

The maps lose nothing: both groups keep the whole latent, and each gives half of the values. So every hook of the layer
runs on two ranks that hold all heads, and the answer is that of plain MLA. Wrapped models answer text prompts: their
language model goes through the same hooks.
"""

from pathlib import Path

import pytest
import torch

from sglang_tpla.artifact.artifact import ArtifactMeta, build
from sglang_tpla.artifact.model_identity import config_hash, weights_hash
from sglang_tpla.measure.statistics import Statistics
from sglang_tpla.plan.model import find
from sglang_tpla.reference_model.checkpoint import Checkpoint
from sglang_tpla.reference_model.forward import PlainModel
from tests.e2e.model_answers import said_and_due
from tests.e2e.servers import launcher, running
from tests.e2e.traffic import Pair
from tests.random_checkpoint import CONFIGS, WRAPPERS, random_checkpoint

TOKENS = 8
# Most of these are of DeepSeek V3's kind, like the shipped checkpoint. DeepSeek V2 has another rope and full-rank
# queries. GLM has a separate class around the same attention. Kimi-VL takes two minutes, and the encoder of
# DeepSeek-VL2 has only one size, 1.6 GB.
SLOW = ("glm-4.7-flash", "kimi-k2", "kimi-k2.5", "kimi-vl", "moonlight", "deepseek-v2.5", "deepseek-v3", "deepseek-vl2")


def whole_latents(folder: Path, path: Path) -> Path:
    """An artifact of two groups that both keep the whole latent."""
    config = Checkpoint(folder).config
    layers, d = config["num_hidden_layers"], config["kv_lora_rank"]
    eye = torch.eye(d)
    meta = ArtifactMeta(
        format_version=1, model_name=folder.name, config_hash=config_hash(config), weights_hash=weights_hash(folder),
        transform="identity", groups=2, num_layers=layers, latent_dim=d, rope_dim=config["qk_rope_head_dim"],
        shared_dims=(d,) * layers, widths=(d,) * layers, calibrated_tokens=0, corpus="none", corpus_hash="", seed=0,
        created_by="a test",
    )  # fmt: skip
    build(meta, [[(eye, eye, eye / 2)] * 2] * layers).save(path)
    return path


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in sorted(CONFIGS | WRAPPERS)],
)
def test_a_family_is_served(family: str, nano_mla: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint(tmp_path / family, family, nano_mla)
    wrapper = ("--trust-remote-code",) if family in WRAPPERS else ()
    monkeypatch.setenv("SGLANG_TPLA_CPU_MEMORY_BYTES", str(3 << 30))
    assert find(str(folder)).latent_dim == 64
    artifact = whole_latents(folder, tmp_path / "whole.safetensors")
    statistics = ("--tpla-statistics-folder", str(tmp_path / "statistics"), "--tpla-statistics-every-tokens", "8")
    prefill = launcher("prefill", folder, tmp_path / "prefill.log", *statistics, *wrapper)
    layout = ("--tp", "2", "--tpla-groups", "2", "--tpla-artifact", str(artifact))
    decode = launcher("decode", folder, tmp_path / "decode.log", *layout, *wrapper)
    model = PlainModel(str(folder))
    with running(prefill, decode):
        pair = Pair(prefill, decode)
        for seed in range(3):
            ids = torch.randint(3, 4096, (20 + 7 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
            said, expected = said_and_due(pair, model, ids, TOKENS, None)
            torch.testing.assert_close(said, expected, rtol=0, atol=2e-3)
        assert decode.get("/server_info")["tpla"]["widths"] == [64] * 3
    (written,) = (tmp_path / "statistics").iterdir()
    seen = Statistics.load(written)
    assert len(seen.layers) == 3 and all(layer.latent_count >= 20 for layer in seen.layers)
    config = Checkpoint(folder).config  # `calibrate --from-stats` compares these hashes
    assert (seen.meta.config_hash, seen.meta.weights_hash) == (config_hash(config), weights_hash(folder))
