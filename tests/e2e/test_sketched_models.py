"""Sketched rows as calibration chooses them, of models of odd widths and head counts, through real servers.

``TEST_SKETCHED_MODEL`` names one more checkpoint, and ``TEST_SKETCHED_RANKS`` the ranks that serve it (2).
"""

import os
from pathlib import Path

import pytest

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.calibrate.pipeline import layer_costs, sketched_form
from sglang_tpla.calibrate.sketch_layout import usual_rows
from sglang_tpla.measure.decode_error import model_maps
from sglang_tpla.measure.text import TextPlan, collect_statistics, read_text
from sglang_tpla.reference_model.forward import PlainModel
from tests.e2e.servers import launcher, running
from tests.e2e.test_sketched_rows import follow_the_model
from tests.e2e.traffic import Pair
from tests.random_checkpoint import CONFIGS, draw_weights, save

OTHER = os.environ.get("TEST_SKETCHED_MODEL")
OTHER_RANKS = int(os.environ.get("TEST_SKETCHED_RANKS", "2"))
ODD = {
    "a row above 256 bytes": {"kv_lora_rank": 160, "qk_rope_head_dim": 64},
    "no power of two": {"kv_lora_rank": 96, "qk_rope_head_dim": 16, "num_attention_heads": 6},
    "unlike layers": {"kv_lora_rank": 72, "qk_rope_head_dim": 32, "num_attention_heads": 2},
}


def sketched(folder: Path, path: Path, groups: int) -> Path:
    """Calibrate a model on a little text, and write its artifact."""
    model = PlainModel(str(folder))
    text = read_text(TextPlan(calibration_tokens=4096, held_out_tokens=0), model.checkpoint)
    statistics = collect_statistics(model, text, 0, show_progress=False)
    costs = layer_costs(statistics, model.checkpoint)
    rows = usual_rows(costs, model.spec.rope_dim, groups)
    sketched_form(statistics, model.spec, costs, rows).save(path)
    return path


def serve_and_compare(folder: Path, tmp_path: Path, groups: int, ranks: int) -> None:
    """Check greedy answers of a prefill server and ``ranks`` decode ranks, token by token."""
    artifact = Artifact.load(sketched(folder, tmp_path / "sketched.safetensors", groups))
    model = PlainModel(str(folder))
    prefill = launcher("prefill", folder, tmp_path / "prefill.log")
    decode = launcher(
        "decode", folder, tmp_path / "decode.log", "--tp", str(ranks), "--tpla-groups", str(groups),
        "--tpla-artifact", str(tmp_path / "sketched.safetensors"),
    )  # fmt: skip
    with running(prefill, decode):
        tpla = decode.get("/server_info")["tpla"]
        rows = [artifact.meta.rows(layer) for layer in range(artifact.meta.num_layers)]
        assert tpla["cache_bytes_per_token_and_rank"] == sum(kind.row_bytes for kind in rows)
        follow_the_model(Pair(prefill, decode), model, model_maps(artifact, model))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ODD))
def test_odd_widths(name: str, nano_mla: str, tmp_path: Path) -> None:
    config = CONFIGS["kimi-k2"] | ODD[name]
    config["num_key_value_heads"] = config["num_attention_heads"]
    folder = save(tmp_path / "model", config, draw_weights(config), nano_mla)
    serve_and_compare(folder, tmp_path, 2, 2)


@pytest.mark.skipif(OTHER is None, reason="TEST_SKETCHED_MODEL names no checkpoint")
def test_another_model(tmp_path: Path) -> None:
    assert OTHER is not None
    serve_and_compare(Path(OTHER), tmp_path, min(OTHER_RANKS, 4), OTHER_RANKS)
