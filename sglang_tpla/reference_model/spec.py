"""The sizes and constants of a DeepSeek V2/V3 or Kimi K2 shaped model, read once from its Hugging Face config.

A missing key, or a rope scaling, query scaling or scoring that this family does not use, raises `CheckpointError`.
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
    rope_scaling,
    rope_theta,
)


@dataclass(frozen=True)
class Yarn:
    """Yarn scaling of the rotary embedding; ``mscale`` has SGLang's default."""

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
    """Dimensions and constants; ``scale`` is the softmax scale with yarn's correction."""

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
    yarn: Yarn | None
    scale: float
    routing: Routing | None
    first_dense: int
    moe_every: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        try:
            return cls._read(language_config(config))
        except KeyError as error:
            raise CheckpointError(
                f"the model's config has no {error}: expected a DeepSeek V2/V3 or Kimi K2 shaped model"
            ) from error

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> ModelSpec:
        check_query_scaling(config)
        yarn = _read_yarn(rope_scaling(config), config)
        scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
        if yarn is not None:
            scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            latent_dim=config["kv_lora_rank"],
            rope_dim=config["qk_rope_head_dim"],
            nope_dim=config["qk_nope_head_dim"],
            value_dim=config["v_head_dim"],
            q_lora_rank=config.get("q_lora_rank"),
            vocab=config["vocab_size"],
            eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta(config),
            yarn=yarn,
            scale=scale,
            routing=_read_routing(config),
            first_dense=config.get("first_k_dense_replace", 0),
            moe_every=config.get("moe_layer_freq", 1),
        )

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.routing is not None and layer >= self.first_dense and layer % self.moe_every == 0


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return Yarn's attention temperature for a stretch of ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("yarn", "deepseek_yarn"):
        raise CheckpointError(f"expected rope scaling 'yarn' or none, got {kind!r}: not a model of this family")
    return Yarn(
        factor=float(rope["factor"]),
        original_positions=int(
            rope.get("original_max_position_embeddings", config.get("max_position_embeddings", 4096))
        ),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 1),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )


def _read_routing(config: Mapping[str, Any]) -> Routing | None:
    experts = config.get("n_routed_experts")
    if not experts:
        return None
    # The biased choice of experts (noaux_tc) came with sigmoid scores, and GLM's configs name only the choice.
    biased = config.get("topk_method") == "noaux_tc" or config.get("model_type") == "deepseek_v3"
    scoring = config.get("scoring_func", "sigmoid" if biased else "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise CheckpointError(f"expected scoring_func 'softmax' or 'sigmoid', got {scoring!r}")
    return Routing(
        experts=experts,
        per_token=config["num_experts_per_tok"],
        groups=config.get("n_group") or 1,
        groups_per_token=config.get("topk_group") or 1,
        scoring=scoring,
        method=config.get("topk_method", "noaux_tc" if scoring == "sigmoid" else "greedy"),
        normalise=bool(config.get("norm_topk_prob", False)),
        scaling=float(config.get("routed_scaling_factor", 1.0)),
        shared_experts=config.get("n_shared_experts") or 0,
    )
