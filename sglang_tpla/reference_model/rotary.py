"""Rotary embedding with DeepSeek's interleaved pairs and yarn, as in SGLang's ``DeepseekScalingRotaryEmbedding``.

A model whose ``rope_interleave`` is false pairs the two halves instead. A rotated vector keeps the order of its values,
as in SGLang's cache. Exact scores only need the same layout of query and key (transformers puts all first halves
first), but the rounding of an 8-bit key depends on the column's number.
"""

import math

import torch

from sglang_tpla.reference_model.spec import ModelSpec, Yarn, yarn_mscale


class Rotary:
    """The frequencies of a model, and the cosine and sine tables made from them."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.device = device
        self.inverse_frequencies = inverse_frequencies(spec).to(device)
        self.amplitude = 1.0
        if spec.yarn is not None:
            yarn = spec.yarn
            self.amplitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)

    def tables(self, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each [tokens, e/2], for positions 0 to tokens - 1."""
        positions = torch.arange(tokens, dtype=torch.float32, device=self.device)
        angles = positions[:, None] * self.inverse_frequencies
        return (angles.cos() * self.amplitude).to(dtype), (angles.sin() * self.amplitude).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool = False) -> torch.Tensor:
    """Rotate interleaved pairs of x [..., S, e], or its halves, by tables [S, e/2], keeping the order of values."""
    if halves:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Return the inverse frequencies [e/2], float32, scaled by yarn if the model has it."""
    dim = spec.rope_dim
    plain = 1.0 / spec.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if spec.yarn is None:
        return plain
    low, high = _correction_range(spec.yarn, spec.rope_theta, dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp  # 1 for frequencies that are high enough to stay
    return plain / spec.yarn.factor * (1 - keep) + plain * keep


def _correction_range(yarn: Yarn, theta: float, dim: int) -> tuple[float, float]:
    def dimension(rotations: float) -> float:
        return dim * math.log(yarn.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), dim - 1)
    return float(low), float(high) if high != low else high + 0.001
