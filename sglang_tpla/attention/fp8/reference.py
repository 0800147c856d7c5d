"""Writing FP8 cache rows in plain PyTorch: the twins of `fp8_write`'s kernel, with its arguments and errors."""

from __future__ import annotations

import torch

from sglang_tpla.attention.interface import checked_fp8_rows, checked_write
from sglang_tpla.attention.reference import rotate_pairs
from sglang_tpla.cache_rows.fp8 import pack_rows


def write_latent(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    z: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    cache: torch.Tensor,
    q_rope: torch.Tensor | None = None,
    *,
    shared: int,
    neox: bool = False,
) -> None:
    """Norm, project, rotate, quantise and write new cache rows; see `fp8_write.write_latent`."""
    rows = checked_write(latent, k_rope, weight, z, cos_sin, positions, slots, cache, q_rope, fp8=True)
    raw = latent.to(torch.float32)
    inverse = torch.rsqrt(raw.square().mean(-1, keepdim=True) + eps)
    normed = (raw * inverse * weight.to(torch.float32)).to(latent.dtype).to(torch.float32)  # [tokens, d]
    kept = normed if z is None else normed @ z  # [tokens, w]
    key = k_rope if cos_sin is None else rotate_pairs(k_rope, cos_sin[positions], neox)
    rows[slots.long()] = pack_rows(kept, key, shared)
    if q_rope is not None and cos_sin is not None:
        q_rope.copy_(rotate_pairs(q_rope, cos_sin[positions].unsqueeze(1), neox))


def write_rows(
    z: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor, *, shared: int
) -> None:
    """Quantise and write rows of slices that are there already; see `fp8_write.write_rows`."""
    rows = checked_fp8_rows(z, k_rope, slots, cache)
    rows[slots.long()] = pack_rows(z, k_rope, shared)
