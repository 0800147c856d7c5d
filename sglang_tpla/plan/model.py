"""The sizes of a DeepSeek-shaped model on which time and memory depend, from its Hugging Face config.

A config without a key, or with an unusable value, raises `PlanError`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_tpla.errors import SglangTplaError
from sglang_tpla.reference_model.config_file import CheckpointError, language_config, read_config, whole


class PlanError(SglangTplaError, ValueError):
    """An input that the planner cannot use; the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class PlanModel:
    """Sizes of one model; every layer's attention is the same.

    Args:
        layers, hidden, heads: of the decoder.
        latent_dim, rope_dim: d and the rotary key, which a token's cache holds in each layer.
        nope_dim, value_dim: per head. q_lora_rank: None where queries come straight from the hidden state.
        other_parameters: experts and dense layers, which are spread over all GPUs.
        table_parameters: embedding and head, which stay bf16.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    q_lora_rank: int | None
    other_parameters: int
    table_parameters: int

    @property
    def query_parameters_a_head(self) -> int:
        """The parameters of one head in ``q_b_proj`` (or ``q_proj``)."""
        return (self.q_lora_rank or self.hidden) * (self.nope_dim + self.rope_dim)

    @property
    def output_parameters_a_head(self) -> int:
        """The parameters of one head in ``o_proj``."""
        return self.value_dim * self.hidden

    @property
    def down_parameters(self) -> int:
        """The parameters of the joint down-projection (low-rank queries, latent, rope key), which every rank holds."""
        return self.hidden * ((self.q_lora_rank or 0) + self.latent_dim + self.rope_dim)


def _read(config: Mapping[str, Any], name: str) -> PlanModel:
    hidden, layers = whole(config, "hidden_size"), whole(config, "num_hidden_layers")
    experts = whole(config, "n_routed_experts", 0, 0)
    dense = min(layers, whole(config, "first_k_dense_replace", 0, 0)) if experts else layers
    expert_parameters = 3 * hidden * whole(config, "moe_intermediate_size") if experts else 0
    moe_layer = expert_parameters * (experts + whole(config, "n_shared_experts", 0, 0)) + hidden * experts
    return PlanModel(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=whole(config, "num_attention_heads"),
        latent_dim=whole(config, "kv_lora_rank"),
        rope_dim=whole(config, "qk_rope_head_dim"),
        nope_dim=whole(config, "qk_nope_head_dim"),
        value_dim=whole(config, "v_head_dim"),
        q_lora_rank=whole(config, "q_lora_rank") if "q_lora_rank" in config else None,
        other_parameters=(layers - dense) * moe_layer + dense * 3 * hidden * whole(config, "intermediate_size"),
        table_parameters=(1 if config.get("tie_word_embeddings") else 2) * hidden * whole(config, "vocab_size"),
    )


_HEAD = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
# The sizes are those of each model's published config.json.
BUILT_IN: dict[str, dict[str, Any]] = {
    "deepseek-v3": _HEAD
    | {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536}
    | {"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048}
    | {"first_k_dense_replace": 3, "intermediate_size": 18432, "vocab_size": 129280},
    "kimi-k2": _HEAD
    | {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 64, "q_lora_rank": 1536}
    | {"n_routed_experts": 384, "n_shared_experts": 1, "moe_intermediate_size": 2048}
    | {"first_k_dense_replace": 1, "intermediate_size": 18432, "vocab_size": 163840},
    "deepseek-v2": _HEAD
    | {"hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536}
    | {"n_routed_experts": 160, "n_shared_experts": 2, "moe_intermediate_size": 1536}
    | {"first_k_dense_replace": 1, "intermediate_size": 12288, "vocab_size": 102400},
    "deepseek-v2-lite": _HEAD
    | {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None}
    | {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1408}
    | {"first_k_dense_replace": 1, "intermediate_size": 10944, "vocab_size": 102400},
}


def find(model: str) -> PlanModel:
    """Find a built-in model by name, or read the config (file or folder) of another."""
    if model.lower() in BUILT_IN:
        return _read(language_config(BUILT_IN[model.lower()]), model.lower())
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise PlanError(f"--model must be one of {', '.join(BUILT_IN)}, or a config.json or its folder; got {model!r}")
    try:
        return _read(read_config(path), str(path))
    except CheckpointError as error:
        raise PlanError(str(error)) from error
