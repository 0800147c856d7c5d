"""The names of its architectures alone decide whether a model is served."""

from pathlib import Path
from typing import Any

import pytest

from sglang_tpla.config import ConfigError
from sglang_tpla.host.model.architectures import REFUSED, SERVED, check_architectures
from sglang_tpla.host.validation import check_config, local_config
from sglang_tpla.reference_model.config_file import CheckpointError


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    check_architectures("/m", [name])


@pytest.mark.parametrize("name", [*REFUSED, "LlamaForCausalLM"])
def test_refused_by_name(name: str) -> None:
    """The refusal has the reason and names the served models."""
    with pytest.raises(ConfigError) as refusal:
        check_architectures("/models/m", [name])
    words = str(refusal.value)
    assert f"/models/m is a {name}" in words and REFUSED.get(name, "not among") in words
    assert all(served in words for served in SERVED)


def test_a_config_without_an_architecture_says_nothing() -> None:
    check_architectures("/m", [])


def test_a_latent_cache_is_not_enough() -> None:
    """Kimi-Linear has a latent cache, and also layers of another kind."""
    latent = {"kv_lora_rank": 512}
    check_config("/m", latent | {"architectures": ["DeepseekV3ForCausalLM"]})
    with pytest.raises(ConfigError, match="linear-attention"):
        check_config("/m", latent | {"architectures": ["KimiLinearForCausalLM"]})
    with pytest.raises(ConfigError, match="no latent cache"):
        check_config("/m", {"architectures": ["KimiVLForConditionalGeneration"], "text_config": {"hidden_size": 8}})
    inner = {**latent, "index_topk": 2048}
    with pytest.raises(ConfigError, match="sparse attention"):
        check_config("/m", {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": inner})


def test_mistral_large_3_in_the_forms_in_which_it_comes(tmp_path: Path) -> None:
    """The model is refused by its name, by its own format, and, in a served class, for scaling queries by position."""
    latent: dict[str, Any] = {"kv_lora_rank": 512, "architectures": ["DeepseekV3ForCausalLM"]}
    for form in (
        {"llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 128.0, "llama_4_scaling_beta": 0.1}},
    ):
        with pytest.raises(CheckpointError, match="scales queries by their position"):
            check_config("/m", latent | form)
        with pytest.raises(CheckpointError, match="scales queries by their position"):
            check_config("/m", {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": latent | form})
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Mistral's own format"):
        local_config(str(tmp_path))
    assert local_config("mistralai/a-model-of-the-hub") == {}
