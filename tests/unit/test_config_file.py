"""Every form of a config.json is one to all who read it."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_tpla.artifact.model_identity import config_hash
from sglang_tpla.plan.model import find
from sglang_tpla.reference_model.config_file import CheckpointError, read_config, rope_theta
from sglang_tpla.reference_model.spec import ModelSpec

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "mscale": 1.0}


def written(folder: Path, **changes: Any) -> Path:
    base = json.loads(Path("examples/nano-mla/config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        base.pop(name, None)
    (folder / "config.json").write_text(json.dumps(base | changes))
    return folder


FORMS: list[dict[str, Any]] = [
    {"rope_theta": 50000.0, "rope_scaling": YARN},
    {"rope_theta": 50000, "rope_scaling": YARN, "rope_parameters": None},
    {"rope_theta": None, "rope_scaling": None, "rope_parameters": YARN | {"rope_theta": 50000.0}},
    {"rope_parameters": YARN | {"rope_theta": 50000.0, "beta_fast": None}},
    {"rope_theta": 50000.0, "rope_parameters": YARN | {"rope_theta": None}},
    {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 50000.0}},
    {"rope_theta": 10000.0, "rope_parameters": YARN | {"rope_theta": 50000.0}},
    {"rope_scaling": YARN | {"rope_theta": 50000.0}, "rope_parameters": YARN | {"rope_theta": 10000.0}},
]


@pytest.mark.parametrize("form", FORMS)
def test_the_rotary_embedding_in_every_form(form: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(written(tmp_path, **form))
    spec = ModelSpec.from_config(config)
    assert spec.rope_theta == 50000.0 and spec.yarn is not None and spec.yarn.factor == 4.0
    assert config_hash(config) == config_hash(FORMS[0] | {k: v for k, v in config.items() if not k.startswith("rope")})


def test_a_wrapper_keeps_the_language_model_one_level_down(tmp_path: Path) -> None:
    inner = json.loads(Path("examples/nano-mla/config.json").read_text())
    wrapper = {"architectures": ["Wrapper"], "kv_lora_rank": None, "text_config": inner | {"moe_layer_freq": None}}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    config = read_config(tmp_path)
    assert ModelSpec.from_config(config).layers == inner["num_hidden_layers"] == find(str(tmp_path)).layers
    assert config_hash(config) == config_hash(inner)


@pytest.mark.parametrize("theta", ["x", -1, True, 0])
def test_a_base_that_is_no_number(theta: Any) -> None:
    with pytest.raises(CheckpointError, match="rope_theta to be a number above 0"):
        rope_theta({"rope_theta": theta})


SCALING = {"original_max_position_embeddings": 8192, "beta": 0.1}


@pytest.mark.parametrize(
    "form",
    [
        {"llama_4_scaling": SCALING},
        {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
        {"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}},
        {"llama_4_scaling_beta": 0.1},
    ],
)
def test_queries_scaled_by_position_are_refused(form: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(written(tmp_path, **form))
    with pytest.raises(CheckpointError, match=r"scales queries by their position .*llama_4_scaling"):
        ModelSpec.from_config(config)
    ModelSpec.from_config(read_config(written(tmp_path, llama_4_scaling=None)))


def test_mistrals_own_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Mistral's own format"):
        read_config(tmp_path)


@pytest.mark.parametrize(("content", "said"), [("[]", "JSON object"), ("{", "not valid JSON")])
def test_what_is_no_config(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="found none at"):
        read_config(tmp_path / "nowhere")
