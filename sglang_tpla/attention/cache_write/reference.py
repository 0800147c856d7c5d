"""Cache writes in plain PyTorch, on any device: the twin of every kernel in this folder."""

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.cache_rows.parts import Part


def write(new: CacheWrite) -> None:
    """Norm, project, rotate, encode and write the new tokens' rows."""
    kept, rows = _slices(new), new.rows  # [tokens, w]
    key = new.k_rope if new.cos_sin is None else rotate_pairs(new.k_rope, new.cos_sin[new.positions], new.neox)
    if new.sketched is not None:
        encoded = rows.new_empty(new.tokens, new.row_items)
        new.sketched.encode(kept, key, Part.FULL, encoded)
    else:
        encoded = torch.cat([kept.to(rows.dtype), key], dim=-1)
    rows[new.slots.long()] = encoded
    if new.q_rope is not None and new.cos_sin is not None:
        turn = new.cos_sin[new.positions].unsqueeze(1)  # [tokens, 1, rope]
        new.q_rope.copy_(rotate_pairs(new.q_rope, turn, new.neox))


def _slices(new: CacheWrite) -> torch.Tensor:
    """Return float32 slices [tokens, w]; the norm is rounded to the model's dtype, as a separate norm kernel would."""
    raw = new.latent.to(torch.float32)
    if new.weight is None:
        return raw
    inverse = torch.rsqrt(raw.square().mean(-1, keepdim=True) + new.eps)
    normed = (raw * inverse * new.weight.to(torch.float32)).to(new.latent.dtype).to(torch.float32)
    return normed if new.z is None else normed @ new.z


def rotate_pairs(key: torch.Tensor, cos_sin: torch.Tensor, neox: bool) -> torch.Tensor:
    """Rotate ``key`` [.., rope] by the cosines and sines ``cos_sin`` [.., rope], keeping the order of its values."""
    cos, sin = cos_sin.chunk(2, dim=-1)  # [tokens, rope / 2]
    wide = key.to(torch.float32)
    x, y = wide.chunk(2, dim=-1) if neox else (wide[..., 0::2], wide[..., 1::2])
    turned = (x * cos - y * sin, y * cos + x * sin)
    together = torch.cat(turned, dim=-1) if neox else torch.stack(turned, dim=-1).flatten(-2)
    return together.to(key.dtype)
