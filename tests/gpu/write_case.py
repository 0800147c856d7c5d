"""Random inputs of a cache write, for CPU and GPU tests: strided rows, slots in random order, a poisoned cache."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite


@dataclass(frozen=True)
class WriteCase:
    """The inputs of a cache write; the cache holds NaN before the write."""

    latent: torch.Tensor
    k_rope: torch.Tensor
    weight: torch.Tensor
    z: torch.Tensor | None
    cos_sin: torch.Tensor | None
    positions: torch.Tensor | None
    slots: torch.Tensor
    cache: torch.Tensor
    q_rope: torch.Tensor | None

    def write(self, eps: float, rotate: str | None = None, **changes: Any) -> CacheWrite:
        """Return the input of the kernels and their twin; ``rotate`` is "halves", "pairs" or None."""
        inputs = {field.name: getattr(self, field.name) for field in fields(self)}
        return CacheWrite(**(inputs | {"eps": eps, "neox": rotate == "halves"} | changes))


def random_write(
    tokens: int,
    d: int,
    w: int | None,
    rope: int,
    rotated: bool,
    dtype: torch.dtype,
    seed: int,
    device: str = "cpu",
    heads: int = 0,
) -> WriteCase:
    """Make a random case, without queries if ``heads`` is 0.

    ``latent`` and ``k_rope`` are columns of one matrix, as the joint down-projection leaves them. The queries' rope
    part is the last columns of each head.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    joint = normal(tokens, d + rope + 8).to(dtype)
    queries = normal(tokens, heads, 12 + rope).to(dtype)
    angles = normal(50, rope // 2)
    width = (d if w is None else w) + rope
    return WriteCase(
        latent=joint[:, 8 : 8 + d],
        k_rope=joint[:, 8 + d :],
        weight=(1 + 0.1 * normal(d)).to(dtype),
        z=None if w is None else normal(d, w) / d**0.5,
        cos_sin=torch.cat([angles.cos(), angles.sin()], 1) if rotated else None,
        positions=torch.randint(0, 50, (tokens,), generator=g, device=device) if rotated else None,
        slots=torch.randperm(tokens + 20, generator=g, device=device)[:tokens],
        cache=torch.full((tokens + 20, 1, width), float("nan"), dtype=dtype, device=device),
        q_rope=queries[..., 12:] if heads else None,
    )
