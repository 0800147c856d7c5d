"""The format of an FP8 latent cache row, in plain PyTorch: what a kernel that reads it has to agree with.

A row of one token and layer is ``w + 4 + 2 * rope`` bytes: the slice in e4m3, its scale as a little-endian float32
(largest magnitude over 448, so that nothing saturates), and the rotary key in bfloat16, which positions make too
sensitive for three mantissa bits. 1,152 bytes of plain MLA in bf16 become 452 at w = 320 with rope 64.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
SCALE_BYTES = 4


def row_bytes(w: int, rope: int) -> int:
    """Bytes of one row."""
    return w + SCALE_BYTES + 2 * rope


def pack_rows(z: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """Rows ``[tokens, row_bytes]`` uint8 of a slice ``[tokens, w]`` and a rotated key ``[tokens, rope]``."""
    values, scale = quantise(z)
    parts = (values, scale, k_rope.to(torch.bfloat16))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_rows(rows: torch.Tensor, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slice ``[tokens, w]`` and the key ``[tokens, rope]`` that rows stand for, float32."""
    values = rows[:, :w].contiguous().view(FP8).to(torch.float32)
    scale = rows[:, w : w + SCALE_BYTES].contiguous().view(torch.float32)  # [tokens, 1]
    key = rows[:, w + SCALE_BYTES :].contiguous().view(torch.bfloat16)
    return values * scale, key.to(torch.float32)


def quantise(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values ``[..., w]`` and float32 scales ``[..., 1]`` of slices ``[..., w]``."""
    wide = z.to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True) / FP8_LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a row of zeros
    return (wide / scale).to(FP8), scale


def rounded(z: torch.Tensor) -> torch.Tensor:
    """Slices as a reader of the cache sees them, in their own dtype."""
    values, scale = quantise(z)
    return (values.to(torch.float32) * scale).to(z.dtype)
