"""The format of an FP8 latent cache row, in plain PyTorch: what pools, transfers and kernels agree on.

A row of one token and layer, in bytes, every field at a multiple of 16:

    [slice: w of e4m3 | rotated key: rope of bfloat16 | scale of the shared columns | scale of the own ones | 8 zeros]

The slice's first r columns are those that every latent group has; they and the rest (a group's own) have a scale each,
a little-endian float32: their largest magnitude over 448, so that nothing saturates. With one scale for both, the
shared columns would differ from group to group and could not travel once for all of them. The rotary key keeps
bfloat16: positions make it too sensitive for three mantissa bits. A part without columns has scale 1.
Plain MLA's 1,152 bytes in bf16 become 464 at w = 320 with rope 64.
"""

import torch

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
SCALE_BYTES = 4
TRAILER_BYTES = 16  # two scales, and zeros up to the alignment
ALIGNMENT = 16


def row_bytes(w: int, rope: int) -> int:
    """Return the bytes of one row."""
    return w + 2 * rope + TRAILER_BYTES


def slice_width(size: int, rope: int) -> int:
    """Return w of a row of ``size`` bytes."""
    return size - 2 * rope - TRAILER_BYTES


def unsupported_reason(w: int, rope: int) -> str | None:
    """Return why a slice cannot be kept in such rows, or None."""
    if w % ALIGNMENT or w < ALIGNMENT:
        return f"FP8 rows hold slices of a multiple of {ALIGNMENT} values, got width {w}"
    if 2 * rope % ALIGNMENT:
        return f"FP8 rows hold rotary keys of a multiple of {ALIGNMENT // 2} values, got {rope}"
    return None


def pack_rows(z: torch.Tensor, k_rope: torch.Tensor, shared: int) -> torch.Tensor:
    """Pack slices ``[..., w]`` and rotated keys ``[..., rope]`` into rows ``[..., row_bytes]`` uint8.

    Args:
        shared: r, how many leading columns every group has.
    """
    common = pack_common(z[..., :shared], k_rope)
    own = pack_own(z[..., shared:])
    tail = shared + 2 * k_rope.shape[-1]  # where the common part's scale begins
    zeros = own.new_zeros(*own.shape[:-1], TRAILER_BYTES - 2 * SCALE_BYTES)
    values, scale = own.split([own.shape[-1] - SCALE_BYTES, SCALE_BYTES], dim=-1)
    return torch.cat([common[..., :shared], values, common[..., shared:tail], common[..., tail:], scale, zeros], dim=-1)


def pack_common(z: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """Pack what all groups have of a token: shared columns ``[..., r]`` and key become ``[..., r + 2 rope + 4]``."""
    values, scale = quantise(z)
    return _bytes(values, k_rope.to(torch.bfloat16), scale)


def pack_own(z: torch.Tensor) -> torch.Tensor:
    """Pack what one group's rows have besides, ``[..., w - r + 4]``, from its own columns ``[..., w - r]``."""
    return _bytes(*quantise(z))


def _bytes(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_rows(rows: torch.Tensor, rope: int, shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slices ``[..., w]`` and the keys ``[..., rope]`` that rows stand for, float32."""
    w = slice_width(rows.shape[-1], rope)
    values, key, scales, _ = rows.split([w, 2 * rope, 2 * SCALE_BYTES, TRAILER_BYTES - 2 * SCALE_BYTES], dim=-1)
    wide = values.contiguous().view(FP8).to(torch.float32)
    common, own = scales.contiguous().view(torch.float32).split(1, dim=-1)
    return (
        torch.cat([wide[..., :shared] * common, wide[..., shared:] * own], dim=-1),
        key.contiguous().view(torch.bfloat16).to(torch.float32),
    )


def quantise(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 values ``[..., n]`` and one float32 scale each ``[..., 1]`` of columns ``[..., n]``."""
    wide = z.to(torch.float32)
    if not wide.shape[-1]:
        return wide.to(FP8), wide.new_ones(*wide.shape[:-1], 1)
    scale = wide.abs().amax(-1, keepdim=True) / FP8_LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a row of zeros
    return (wide / scale).to(FP8), scale


def rounded(z: torch.Tensor, shared: int) -> torch.Tensor:
    """Return slices as a reader of the cache sees them, in their own dtype."""
    parts = [quantise(part) for part in (z[..., :shared], z[..., shared:])]
    return torch.cat([values.to(torch.float32) * scale for values, scale in parts], dim=-1).to(z.dtype)
