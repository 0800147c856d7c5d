"""Weights on a rank, and the cached tokens that fit beside them."""

from __future__ import annotations

from sglang_tpla.plan.cost import Method, Precision, RankWork
from sglang_tpla.plan.hardware import Gpu
from sglang_tpla.plan.model import PlanModel

_BF16_BYTES = 2


def weight_bytes(model: PlanModel, work: RankWork, precision: Precision, gpus: int) -> float:
    """Bytes of weights on one rank; what is not attention is spread evenly over ``gpus``."""
    heads = work.heads
    quantised = model.down_parameters
    quantised += heads * model.query_parameters_a_head + work.out_heads * model.output_parameters_a_head
    per_head = model.nope_dim + model.value_dim
    quantised += heads * per_head * model.latent_dim  # kv_b_proj, of which the absorbed weights are made
    absorbed = heads * per_head * work.width
    attention = model.layers * (quantised * precision.weight_bytes + absorbed * _BF16_BYTES)
    others = model.other_parameters * precision.weight_bytes + model.table_parameters * _BF16_BYTES
    return attention + others / gpus


def tokens_that_fit(
    model: PlanModel, method: Method, work: RankWork, weights: float, gpu: Gpu, fraction: float
) -> int:
    """Cached tokens of all ranks together; 0 where the weights alone do not fit."""
    free = gpu.memory_bytes * fraction - weights
    return max(0, int(free // (work.cache_row_bytes * model.layers))) * method.cache_ranks
