"""Tools that read checkpoints take every form that servers take: sharded, wrapped, with and without yarn."""

import json
from pathlib import Path

import pytest
import torch

from sglang_tpla.artifact.artifact import Artifact
from sglang_tpla.artifact.model_identity import config_hash, weights_hash
from sglang_tpla.calibrate import __main__ as calibrate
from sglang_tpla.evaluate import __main__ as evaluate
from sglang_tpla.plan import __main__ as plan
from sglang_tpla.plan.model import find
from sglang_tpla.reference_model.checkpoint import Checkpoint
from sglang_tpla.reference_model.forward import PlainModel
from tests.random_checkpoint import CONFIGS, WRAPPERS, draw_weights, random_checkpoint


@pytest.mark.parametrize("family", sorted(CONFIGS | WRAPPERS))
def test_every_tool_reads_a_family(family: str, nano_mla: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / family, family, nano_mla)
    checkpoint = Checkpoint(folder)
    assert len(config_hash(checkpoint.config)) == len(weights_hash(folder)) == 64
    assert find(str(folder)).heads == 4
    logits = PlainModel(str(folder)).forward(torch.tensor([[5, 6, 7, 8]]))
    assert logits.shape == (1, 4, 4096) and bool(logits.isfinite().all())


@pytest.mark.parametrize("family", sorted(WRAPPERS))
def test_a_wrapper_is_the_model_inside(family: str, nano_mla: str, tmp_path: Path) -> None:
    wrapped = random_checkpoint(tmp_path / family, family, nano_mla)
    inner = random_checkpoint(tmp_path / "inner", WRAPPERS[family][0], nano_mla)
    assert weights_hash(wrapped) == weights_hash(inner)
    assert config_hash(Checkpoint(wrapped).config) == config_hash(Checkpoint(inner).config)
    tokens = torch.tensor([[3, 1000, 77]])
    assert torch.equal(PlainModel(str(wrapped)).forward(tokens), PlainModel(str(inner)).forward(tokens))


def test_checkpoints_are_sharded(nano_mla: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "m", "moonlight", nano_mla)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) == 2 and set(places) == set(draw_weights(CONFIGS["moonlight"]))


def test_commands_read_a_wrapped_model_of_a_later_transformers(
    nano_mla: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nested config has the rotary embedding in ``rope_parameters``, and nulls under the older names."""
    folder = random_checkpoint(tmp_path / "kimi-k2.5", "kimi-k2.5", nano_mla)
    identity = config_hash(Checkpoint(folder).config)
    whole = json.loads((folder / "config.json").read_text())
    inner = whole["text_config"]
    yarn = {"rope_theta": inner["rope_theta"]} | inner["rope_scaling"]  # a base in the scaling replaces the other
    inner |= {"rope_theta": None, "rope_scaling": None, "rope_parameters": yarn}
    (folder / "config.json").write_text(json.dumps(whole))
    artifact, few = tmp_path / "a.safetensors", ["--prompt-tokens", "64", "--continuation-tokens", "32"]
    made = ["--tokens", "256", "--held-out-tokens", "64", *few]
    assert calibrate.main(["--model-path", str(folder), "--out", str(artifact), *made]) == 0
    Artifact.load(artifact).check_model(Checkpoint(folder).config, weights_hash(folder), 2)
    assert Artifact.load(artifact).meta.config_hash == identity
    measured = ["--tokens", "64", "--long-tokens", "0", "--no-paper", "--out", str(tmp_path), *few]
    assert evaluate.main(["--model-path", str(folder), "--artifact", str(artifact), *measured]) == 0
    assert (tmp_path / "evaluation.json").is_file()
    capsys.readouterr()
    plan.main(["--model", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)
