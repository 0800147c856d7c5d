"""Random inputs of a cache write, for CPU and GPU tests: strided rows, slots in random order, a poisoned cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WriteCase:
    """Arguments of ``write_latent``; the cache holds NaN wherever nothing was written."""

    latent: torch.Tensor
    k_rope: torch.Tensor
    weight: torch.Tensor
    z: torch.Tensor | None
    cos_sin: torch.Tensor | None
    positions: torch.Tensor | None
    slots: torch.Tensor
    cache: torch.Tensor
    q_rope: torch.Tensor | None

    def arguments(self, eps: float) -> tuple:
        """In the order of ``write_latent``."""
        return (
            *(self.latent, self.k_rope, self.weight, eps, self.z),
            *(self.cos_sin, self.positions, self.slots, self.cache, self.q_rope),
        )


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
    """``latent`` and ``k_rope`` are columns of one matrix, as the joint down-projection leaves them; the queries' rope
    part are the last columns of each head. No heads: no queries.
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
