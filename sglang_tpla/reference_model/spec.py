"""The sizes and constants of a DeepSeek V2/V3 or Kimi K2 shaped model, read once from its Hugging Face config.

A missing key, a value of another kind, or a rope scaling, query scaling or scoring that this family does not use,
raises `CheckpointError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_tpla.reference_model.config_file import (
    CheckpointError,
    check_query_scaling,
    language_config,
    place,
    real,
    rope_scaling,
    rope_theta,
    whole,
)

# SGLang follows or refuses other values of these keys; what is computed here has these.
_FIXED = {"hidden_act": "silu", "swiglu_limit": None}
_FIXED_YARN = {"attn_factor": 1, "extrapolation_factor": 1, "apply_yarn_scaling": True, "apply_scale": True}


@dataclass(frozen=True)
class Yarn:
    """Yarn scaling of the rotary embedding; ``mscale`` defaults to SGLang's default."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class Routing:
    """The choice of a token's experts; ``scoring`` is softmax (V2) or sigmoid (V3)."""

    experts: int
    per_token: int
    groups: int
    groups_per_token: int
    scoring: str
    method: str
    normalise: bool
    scaling: float
    shared_experts: int


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions and constants; ``scale`` is the softmax scale with yarn's correction.

    ``rope_halves`` is whether a rotated pair is a value of the first half and one of the second, and not neighbours.
    """

    hidden: int
    layers: int
    heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    q_lora_rank: int | None
    vocab: int
    eps: float
    rope_theta: float
    rope_halves: bool
    yarn: Yarn | None
    scale: float
    routing: Routing | None
    first_dense: int
    moe_every: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a model's config.

        Raises:
            CheckpointError: a key is missing, or has a value that this family does not use.
        """
        config = language_config(config)
        check_query_scaling(config)
        _check_fixed(config, _FIXED, config)
        yarn = _read_yarn(rope_scaling(config), config)
        rope_dim, nope_dim = whole(config, "qk_rope_head_dim"), whole(config, "qk_nope_head_dim")
        if rope_dim % 2:
            raise CheckpointError(
                f"expected qk_rope_head_dim to be even, as its values are pairs, got {rope_dim}{place(config)}"
            )
        scale = (nope_dim + rope_dim) ** -0.5
        if yarn is not None:
            scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
        return cls(
            hidden=whole(config, "hidden_size"),
            layers=whole(config, "num_hidden_layers"),
            heads=whole(config, "num_attention_heads"),
            latent_dim=whole(config, "kv_lora_rank"),
            rope_dim=rope_dim,
            nope_dim=nope_dim,
            value_dim=whole(config, "v_head_dim"),
            q_lora_rank=whole(config, "q_lora_rank") if "q_lora_rank" in config else None,
            vocab=whole(config, "vocab_size"),
            eps=real(config, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta(config),
            rope_halves=not config.get("rope_interleave", True),
            yarn=yarn,
            scale=scale,
            routing=_read_routing(config),
            first_dense=whole(config, "first_k_dense_replace", 0, 0),
            moe_every=whole(config, "moe_layer_freq", 1, 1),
        )

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.routing is not None and layer >= self.first_dense and layer % self.moe_every == 0


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return Yarn's attention temperature for a context longer by ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for key, value in fixed.items():
        if (found := values.get(key, value)) != value:
            raise CheckpointError(
                f"expected {key} to be {'absent' if value is None else repr(value)}, got {found!r}{place(config)}: not "
                "a model of this family"
            )


def _read_yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("yarn", "deepseek_yarn"):
        raise CheckpointError(
            f"expected rope scaling 'yarn' or none, got {kind!r}{place(config)}: not a model of this family"
        )
    _check_fixed(rope, _FIXED_YARN, config)
    return Yarn(
        factor=real(rope, "factor"),
        original_positions=int(
            real(rope, "original_max_position_embeddings", real(config, "max_position_embeddings", 4096))
        ),
        beta_fast=real(rope, "beta_fast", 32) or 32,
        beta_slow=real(rope, "beta_slow", 1) or 1,
        mscale=real(rope, "mscale", 1) or 1,
        mscale_all_dim=real(rope, "mscale_all_dim", 0),
    )


def _read_routing(config: Mapping[str, Any]) -> Routing | None:
    experts = whole(config, "n_routed_experts", 0, 0)
    if not experts:
        return None
    per_token, groups = whole(config, "num_experts_per_tok"), whole(config, "n_group", 0, 1) or 1
    groups_per_token = whole(config, "topk_group", 0, 1) or 1
    if per_token > experts or experts % groups or groups_per_token > groups:
        raise CheckpointError(
            f"expected num_experts_per_tok to be at most n_routed_experts, n_group to divide it and topk_group to be "
            f"at most n_group, got {per_token}, {experts}, {groups} and {groups_per_token}"
            f"{place(config)}"
        )
    # The biased choice of experts (noaux_tc) came with sigmoid scores, and GLM's configs name only the choice.
    biased = config.get("topk_method") == "noaux_tc" or config.get("model_type") == "deepseek_v3"
    scoring = config.get("scoring_func", "sigmoid" if biased else "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise CheckpointError(f"expected scoring_func 'softmax' or 'sigmoid', got {scoring!r}{place(config)}")
    method = config.get("topk_method", "noaux_tc" if scoring == "sigmoid" else "greedy")
    if method not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise CheckpointError(
            f"expected topk_method 'greedy', 'group_limited_greedy' or 'noaux_tc', got {method!r}{place(config)}"
        )
    return Routing(
        experts=experts,
        per_token=per_token,
        groups=groups,
        groups_per_token=groups_per_token,
        scoring=scoring,
        method=method,
        normalise=bool(config.get("norm_topk_prob", False)),
        scaling=real(config, "routed_scaling_factor", 1.0),
        shared_experts=whole(config, "n_shared_experts", 0, 0),
    )
