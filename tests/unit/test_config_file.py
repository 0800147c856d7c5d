"""Every form of a config.json reads as the same configuration."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_tpla.artifact.model_identity import config_hash
from sglang_tpla.plan.model import find
from sglang_tpla.reference_model.config_file import CheckpointError, read_config, rope_theta, separator, weight_block
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


@pytest.mark.parametrize("theta", ["x", -1, True, 0, 1])
def test_a_base_that_is_no_number(theta: Any) -> None:
    with pytest.raises(CheckpointError, match="rope_theta to be a number above 1"):
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


@pytest.mark.parametrize("value", ["x", -1, [1], {}, 1.5, float("inf"), True, 10**40])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim", "vocab_size", "n_routed_experts", "num_experts_per_tok", "n_group",
        "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq",
    ],
)  # fmt: skip
def test_a_size_that_is_no_whole_number_is_named(key: str, value: Any, tmp_path: Path) -> None:
    config = read_config(written(tmp_path, **{key: value}))
    with pytest.raises(
        CheckpointError, match=f"expected {key} to be a whole number from [01] to 1048576, got .* in {tmp_path}"
    ):
        ModelSpec.from_config(config)


@pytest.mark.parametrize("value", ["x", [1], {}, float("nan"), float("inf"), True, 10**400])
def test_a_constant_that_is_no_number_is_named(value: Any, tmp_path: Path) -> None:
    for key in ("rms_norm_eps", "routed_scaling_factor"):
        with pytest.raises(CheckpointError, match=f"expected {key} to be a number .*, got "):
            ModelSpec.from_config(read_config(written(tmp_path, **{key: value})))
    for key in ("factor", "original_max_position_embeddings", "beta_fast", "mscale", "mscale_all_dim"):
        config = read_config(written(tmp_path, rope_scaling=YARN | {key: value}))
        for read in (ModelSpec.from_config, config_hash):
            with pytest.raises(CheckpointError, match=f"expected {key} to be a number .*, got "):
                read(config)
    with pytest.raises(CheckpointError, match="expected rms_norm_eps to be a number from 0 to 1, got "):
        config_hash(read_config(written(tmp_path, rms_norm_eps=value)))


@pytest.mark.parametrize(
    ("key", "value", "range_"),
    [
        ("rms_norm_eps", -1e-6, "from 0 to 1"), ("rms_norm_eps", 1e30, "from 0 to 1"),
        ("routed_scaling_factor", 0, "above 0"), ("routed_scaling_factor", -2.5, "above 0"),
        ("rope_theta", 1, "above 1"),
        ("rope_theta", 1e39, "above 1"), ("max_position_embeddings", 0, "from 1"), ("factor", 0, "above 0"),
        ("factor", -4.0, "above 0"), ("original_max_position_embeddings", 0.5, "from 1"), ("beta_fast", -32, "from 0"),
        ("beta_slow", -1, "from 0"), ("mscale", -1, "from 0"), ("mscale_all_dim", -0.1, "from 0"),
    ],
)  # fmt: skip
def test_a_constant_that_no_model_has_is_named_with_its_file(
    key: str, value: float, range_: str, tmp_path: Path
) -> None:
    changes = {"rope_scaling": YARN | {key: value}} if key in (*YARN, "beta_fast", "beta_slow", "mscale_all_dim") else {
        "rope_scaling": YARN, key: value
    }  # fmt: skip
    said = re.escape(f"expected {key} to be a number {range_}, got {value!r} in {tmp_path / 'config.json'}")
    with pytest.raises(CheckpointError, match=said):
        ModelSpec.from_config(read_config(written(tmp_path, **changes)))


def test_constants_at_the_ends_of_their_ranges(tmp_path: Path) -> None:
    """SGLang takes its default for 0 in some keys, and a norm may have no epsilon."""
    zeros = dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), 0)
    spec = ModelSpec.from_config(read_config(written(tmp_path, rms_norm_eps=0, rope_scaling=YARN | zeros)))
    assert spec.eps == 0 and spec.yarn is not None
    assert (spec.yarn.beta_fast, spec.yarn.beta_slow, spec.yarn.mscale, spec.yarn.mscale_all_dim) == (32, 1, 1, 0)


@pytest.mark.parametrize("block", ["x", [128], [0, 128], [1.5, 2], {}, True])
def test_a_block_of_weights_that_is_none(block: Any, tmp_path: Path) -> None:
    config = read_config(written(tmp_path, quantization_config={"weight_block_size": block}))
    with pytest.raises(CheckpointError, match=rf"expected weight_block_size .* in {tmp_path}"):
        weight_block(config)
    assert weight_block({}) == weight_block({"quantization_config": {"weight_block_size": None}}) == (128, 128)


@pytest.mark.parametrize("token", ["</s>", [], -1, 1.0, True, {"a": 1}])
def test_an_end_of_text_that_is_no_token(token: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"expected eos_token_id .* in {tmp_path}"):
        separator(read_config(written(tmp_path, eos_token_id=token)))
    assert [separator({"eos_token_id": good}) for good in (7, [7, 8], None)] == [7, 7, None]


@pytest.mark.parametrize("experts", [{"num_experts_per_tok": 9}, {"n_group": 3}, {"n_group": 2, "topk_group": 3}])
def test_a_choice_of_experts_that_cannot_be_made(experts: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected num_experts_per_tok to be at most n_routed_experts"):
        ModelSpec.from_config(read_config(written(tmp_path, **experts)))


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("topk_method", "nothing", "'greedy', 'group_limited_greedy' or 'noaux_tc'"),
        ("topk_method", ["greedy"], "'greedy', 'group_limited_greedy' or 'noaux_tc'"),
        ("scoring_func", "nothing", "'softmax' or 'sigmoid'"),
    ],
)
def test_another_choice_of_experts_is_named_with_its_file(key: str, value: Any, known: str, tmp_path: Path) -> None:
    said = re.escape(f"expected {key} {known}, got {value!r} in {tmp_path / 'config.json'}")
    with pytest.raises(CheckpointError, match=said):
        ModelSpec.from_config(read_config(written(tmp_path, **{key: value})))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"swiglu_limit": 7.0},
        {"rope_scaling": YARN | {"attn_factor": 0.5}},
        {"rope_parameters": YARN | {"rope_theta": 1e4, "apply_yarn_scaling": False}},
    ],
)
def test_arithmetic_that_the_reference_does_not_have_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"expected \w+ to be \S+, got \S+ in {tmp_path}.*: not a model of this"):
        ModelSpec.from_config(read_config(written(tmp_path, **changes)))
    usual = {"hidden_act": "silu", "swiglu_limit": None, "rope_scaling": YARN | {"attn_factor": 1.0}}
    assert ModelSpec.from_config(read_config(written(tmp_path, **usual))).yarn


def test_values_of_the_rotary_key_are_pairs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected qk_rope_head_dim to be even"):
        ModelSpec.from_config(read_config(written(tmp_path, qk_rope_head_dim=31)))
