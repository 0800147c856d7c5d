"""The format of a sketched latent cache row, in plain PyTorch; pools, transfers and kernels follow it.

Every rank keeps the columns of its own latent group at 8 bits, for scores and values, and a sketch of the other
groups' columns at b bits, which only scores use. The row of one token and layer on a rank of group i has these bytes,
without gaps (``SketchedRows`` has every size and offset):

    [ shared: r bytes | own: n bytes | bytes of 128 up to w_pad | rope: bfloat16 or bytes | sketch: block j of n codes
      of b bits for every other group j, ascending | zeros up to the scales | 4 bfloat16 scales: shared, own, sketch,
      rope ]

* A byte is a code of 1 to 255, ``value = scale * (code - 128)``. Its scale is the largest magnitude over 127, rounded
  up to a bfloat16 whose last bit is zero: 1152 times such a scale is exact in float16. Zeros have scale 1.
* Even and odd groups round shared columns and a rotary key of bytes in two different ways (``turns``): the code of
  column k in group i is ``value / scale + 128``, plus 1/4 if i + k is even and minus 1/4 if it is odd, rounded. The
  groups' outputs add up, and each has 1/g of the shared values, so the sum has the shared values with half the step;
  errors of scores cancel likewise. Without own columns all groups have the same row, whose codes are the nearest ones.
* A sketch code c of b bits is ``value = scale * (c - (2^b - 1) / 2)``, the nearest one. The scale is ``STEP`` times the
  root mean square of the sketch, the best step for a Gaussian, or a ``REACH``-th of the largest magnitude if that is
  more: no value lies far beyond the last level. All g blocks of a token have one scale, so that the sketch is the
  same for every rank.
* Code k of a block occupies bits k*b to k*b+b-1 of a little-endian bit stream.
* Codes count upwards from the least value, so that a kernel turns one into float16 by writing it into the mantissa of
  1024 and subtracting.
* The scale of a field that a row does not have stays in its place and is 1. A sketch of zeros has scale 0.
* A part with a value that is not finite has a scale that is not finite, so that every reader of the part notices.

One group (r = d, n = 0) is plain MLA with an 8-bit cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

SKETCH_BITS = (2, 3, 4)
ROPE_BITS = (8, 16)
SCALES_BYTES = 8  # shared, own, sketch, rope
SCALE_BYTES = 2
ZERO_CODE = 128  # the byte of the value 0
LARGEST_CODE = 127  # the largest distance of a byte from ZERO_CODE
TURN = 0.25  # the fraction of a step that one group adds before rounding and the next subtracts
ALIGNMENT = 16  # bytes; a GPU reads fields and rows with 16-byte loads
ALIGNED_FROM_BYTES = 256  # shorter rows are aligned to 4 bytes: more padding would cost more than it gains

# The step of the best uniform quantiser of a Gaussian by bits, in standard deviations.
STEP: dict[int, float] = {2: 0.9957, 3: 0.5860, 4: 0.3352}
# The largest value lies at most this many steps from zero; the last level is at 1.5, 3.5 and 7.5.
REACH: dict[int, float] = {2: 3.5, 3: 5.0, 4: 8.5}


@dataclass(frozen=True)
class SketchedRows:
    """The sizes of one layer's rows.

    Args:
        latent_dim: d, columns of the latent.
        groups: g, latent groups.
        shared: r, columns that every group keeps.
        own: n, columns that only one group keeps, so that d = r + g n.
        rope_dim: values of the rotary key.
        sketch_bits: b, bits of a sketch code.
        rope_bits: 16 (bfloat16) or 8 (bytes with a scale).

    Raises:
        ValueError: the sizes contradict each other or the format; the message gives the reason.
    """

    latent_dim: int
    groups: int
    shared: int
    own: int
    rope_dim: int
    sketch_bits: int = 4
    rope_bits: int = 16

    def __post_init__(self) -> None:
        if self.latent_dim < 1 or self.groups < 1 or self.shared < 0 or self.own < 0 or self.rope_dim < 0:
            raise ValueError(f"expected sizes of sketched rows that are not negative, got {self}")
        if self.sketch_bits not in SKETCH_BITS:
            raise ValueError(f"expected sketch bits among {SKETCH_BITS}, got {self.sketch_bits}")
        if self.rope_bits not in ROPE_BITS:
            raise ValueError(f"expected rope bits among {ROPE_BITS}, got {self.rope_bits}")
        if self.shared + self.groups * self.own != self.latent_dim:
            raise ValueError(
                f"sketched rows need r + g n = d: {self.shared} shared columns and {self.groups} groups of "
                f"{self.own} do not make {self.latent_dim}; choose --shared-dims so that g divides d - r"
            )
        if self.groups == 1 and self.own:
            raise ValueError(f"one group shares all its columns: expected own = 0, got {self.own}")
        if self.own * self.sketch_bits % 8:
            raise ValueError(
                f"a group's block of {self.own} codes of {self.sketch_bits} bits is no whole number of bytes; choose "
                "--shared-dims so that (d - r) / g is a multiple of 8"
            )

    @classmethod
    def of(
        cls, latent_dim: int, groups: int, shared: int, rope_dim: int, *, sketch_bits: int = 4, rope_bits: int = 16
    ) -> SketchedRows:
        """Return the rows of g groups with r shared columns; a single group shares all columns.

        Raises:
            ValueError: g does not divide d - r, or the format cannot hold such rows.
        """
        shared = latent_dim if groups == 1 else shared
        own = (latent_dim - shared) // max(groups, 1)
        return cls(latent_dim, groups, shared, own, rope_dim, sketch_bits, rope_bits)

    @property
    def w(self) -> int:
        """Columns that the rank has at 8 bits: shared and own."""
        return self.shared + self.own

    @property
    def sketch_columns(self) -> int:
        """Columns of the other groups, which a row holds as a sketch."""
        return (self.groups - 1) * self.own

    @property
    def score_columns(self) -> int:
        """Columns that a query has besides the rotary ones: 8-bit columns, padding, sketch."""
        return self.w_pad + self.sketch_columns

    @property
    def block_bytes(self) -> int:
        """Bytes of one group's sketch."""
        return self.own * self.sketch_bits // 8

    @property
    def sketch_bytes(self) -> int:
        """Bytes of the sketch in a row."""
        return (self.groups - 1) * self.block_bytes

    @property
    def rope_bytes(self) -> int:
        """Bytes of the rotary key."""
        return self.rope_dim * self.rope_bits // 8

    @property
    def bare_bytes(self) -> int:
        """Bytes of a row without padding."""
        return self.w + self.rope_bytes + self.sketch_bytes + SCALES_BYTES

    @property
    def alignment(self) -> int:
        """Bytes of which the size of a row is a multiple: 16, or 4 for rows below 256 bytes."""
        return ALIGNMENT if self.bare_bytes >= ALIGNED_FROM_BYTES else 4

    @property
    def w_pad(self) -> int:
        """Bytes of the 8-bit columns with their padding; also the columns of an attention output."""
        return _up(self.w, ALIGNMENT) if self.alignment == ALIGNMENT else self.w

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; all code takes the number from this formula."""
        return _up(self.w_pad + self.rope_bytes + self.sketch_bytes + SCALES_BYTES, self.alignment)

    @property
    def rope_offset(self) -> int:
        """Offset of the rotary key."""
        return self.w_pad

    @property
    def sketch_offset(self) -> int:
        """Offset of the sketch."""
        return self.w_pad + self.rope_bytes

    @property
    def scales_offset(self) -> int:
        """Offset of the four scales: they are the last 8 bytes of a row."""
        return self.row_bytes - SCALES_BYTES

    @property
    def turns(self) -> int:
        """Number of ways in which groups round the bytes that all have: 2, or 1 if all groups have the same row."""
        return 2 if self.groups > 1 and self.own else 1

    @property
    def key_turns(self) -> int:
        """Number of ways in which groups round the rotary key: ``turns`` if the key is stored as bytes, else 1."""
        return self.turns if self.rope_bits == 8 else 1

    def turn(self, group: int) -> float:
        """Return the steps that a group adds to even columns, and subtracts from odd ones, before rounding."""
        return 0.0 if self.turns == 1 else -TURN if group % self.turns else TURN

    @property
    def common_bytes(self) -> int:
        """Bytes of a token's common part on the wire, from which every group takes its share: see ``encode_common``."""
        twice = self.turns * self.shared + self.key_turns * self.rope_bytes
        return twice + self.groups * self.block_bytes + 3 * SCALE_BYTES

    @property
    def own_bytes(self) -> int:
        """Bytes of a token's own part of one group on the wire: see ``encode_own``."""
        return self.own + SCALE_BYTES if self.own else 0

    def common_copies(self, group: int) -> tuple[tuple[int, int, int], ...]:
        """Return (from, to, bytes) of each piece of the common part that a row of ``group`` has.

        The row has one of the roundings of shared columns and of a key of bytes, and all blocks but the group's own.
        """
        key = self.turns * self.shared
        sketch = key + self.key_turns * self.rope_bytes
        block, before = self.block_bytes, group * self.block_bytes
        scales = sketch + self.groups * block
        pieces = (
            (group % self.turns * self.shared, 0, self.shared),
            (key + group % self.key_turns * self.rope_bytes, self.rope_offset, self.rope_bytes),
            (sketch, self.sketch_offset, before),
            (sketch + before + block, self.sketch_offset + before, self.sketch_bytes - before),
            (scales, self.scales_offset, SCALE_BYTES),
            (scales + SCALE_BYTES, self.scales_offset + 2 * SCALE_BYTES, 2 * SCALE_BYTES),
        )
        return tuple(piece for piece in pieces if piece[2])

    def own_copies(self) -> tuple[tuple[int, int, int], ...]:
        """Return (from, to, bytes) of each piece of a group's own part in a row."""
        if not self.own:
            return ()
        return ((0, self.shared, self.own), (self.own, self.scales_offset + SCALE_BYTES, SCALE_BYTES))


@dataclass(frozen=True)
class Unpacked:
    """The values of rows in float32: ``latent`` [..., w_pad], ``k_rope`` [..., rope], ``sketch`` [..., (g-1) n]."""

    latent: torch.Tensor
    k_rope: torch.Tensor
    sketch: torch.Tensor


def pack_rows(
    rows: SketchedRows, group: int, shared: torch.Tensor, own: torch.Tensor, sketch: torch.Tensor, k_rope: torch.Tensor
) -> torch.Tensor:
    """Return rows ``[..., row_bytes]`` uint8 of group ``group``.

    Args:
        shared: ``[..., r]``, rotated.
        own: ``[..., n]``, the group's own columns, rotated.
        sketch: ``[..., g n]``, the sketch columns of all groups (the group's own among them), scaled and rotated.
        k_rope: ``[..., rope]``, the rotated key.
    """
    return assemble(rows, group, encode_common(rows, shared, sketch, k_rope), encode_own(rows, own))


def encode_common(rows: SketchedRows, shared: torch.Tensor, sketch: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """Return the common part of tokens, ``[..., common_bytes]`` uint8; arguments as in ``pack_rows``.

    The part has, in order: the shared codes of groups 0, 2, ..., those of groups 1, 3, ..., the rotary key (also twice
    if it is stored as bytes), the sketch blocks of all groups, the scales of shared, sketch and rope.
    """
    shared_codes, shared_scale = quantise_in_turns(rows, shared)
    codes, sketch_scale = quantise_sketch(sketch, rows.sketch_bits)
    if rows.rope_bits == 8:
        keys, rope_scale = quantise_in_turns(rows, k_rope)
    else:
        keys, rope_scale = [k_rope.to(torch.bfloat16)], torch.ones_like(shared_scale)
    blocks = pack_bits(codes, rows.sketch_bits)  # a block fills whole bytes, so blocks can be packed together
    return _bytes(*shared_codes, *keys, blocks, shared_scale, sketch_scale, rope_scale)


def encode_own(rows: SketchedRows, own: torch.Tensor) -> torch.Tensor:
    """Return one group's own part, ``[..., own_bytes]`` uint8: codes and scale of its own columns."""
    if not rows.own:
        return own.new_empty(*own.shape[:-1], 0, dtype=torch.uint8)
    return _bytes(*quantise(own))


def assemble(rows: SketchedRows, group: int, common: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return rows ``[..., row_bytes]`` of group ``group`` from both parts."""
    if not 0 <= group < rows.groups:
        raise ValueError(f"expected a group from 0 to {rows.groups - 1}, got {group}")
    out = common.new_zeros(*common.shape[:-1], rows.row_bytes)
    out[..., rows.w : rows.w_pad] = ZERO_CODE
    if not rows.own:  # the scale's place is kept
        at = rows.scales_offset + SCALE_BYTES
        out[..., at : at + SCALE_BYTES] = _constant((0x80, 0x3F), out.device)  # 1 in bfloat16
    for part, copies in ((common, rows.common_copies(group)), (own, rows.own_copies())):
        for start, to, size in copies:
            out[..., to : to + size] = part[..., start : start + size]
    return out


def unpack_rows(rows: SketchedRows, packed: torch.Tensor) -> Unpacked:
    """Return the values of rows ``[..., row_bytes]`` uint8; padded latent columns are zeros."""
    scales = packed[..., rows.scales_offset :].contiguous().view(torch.bfloat16).to(torch.float32)
    shared, own, sketch, rope = scales.split(1, dim=-1)
    parts = packed[..., : rows.shared], packed[..., rows.shared : rows.w_pad]
    latent = torch.cat([byte_values(parts[0], shared), byte_values(parts[1], own)], dim=-1)
    # Copy even a single row, because a view as bfloat16 must start at a multiple of 2 bytes.
    key = packed[..., rows.rope_offset : rows.rope_offset + rows.rope_bytes].clone()
    if rows.rope_bits == 8:
        k_rope = byte_values(key, rope)
    else:
        k_rope = key.view(torch.bfloat16).to(torch.float32)
    bits = packed[..., rows.sketch_offset : rows.sketch_offset + rows.sketch_bytes]
    return Unpacked(latent, k_rope, sketch_values(unpack_bits(bits, rows.sketch_bits), sketch, rows.sketch_bits))


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes ``[..., n]`` and a bfloat16 scale ``[..., 1]`` of ``[..., n]``; the scale is 1 if n is 0."""
    steps, scale = _over_scale(values)
    return _nearest(steps), scale


def byte_values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of bytes ``[..., n]`` with scales ``[..., 1]``."""
    return (codes.to(torch.float32) - ZERO_CODE) * scale.to(torch.float32)


def quantise_in_turns(rows: SketchedRows, values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return bytes of columns ``[..., n]`` for each of the ``turns``, and one scale as in ``quantise``."""
    steps, scale = _over_scale(values)
    signs = _alternating(steps.shape[-1], steps.device)
    return [_nearest(steps + rows.turn(group) * signs) for group in range(rows.turns)], scale


def _over_scale(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 values divided by their scale, and that scale, bfloat16 ``[..., 1]``."""
    wide = values.to(torch.float32)
    if not wide.shape[-1]:
        return wide, wide.new_ones(*wide.shape[:-1], 1, dtype=torch.bfloat16)
    scale = round_up_scale(wide.abs().amax(-1, keepdim=True) / LARGEST_CODE)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros
    return wide / scale, scale.to(torch.bfloat16)


def _nearest(steps: torch.Tensor) -> torch.Tensor:
    return (steps.round().clamp(-LARGEST_CODE, LARGEST_CODE) + ZERO_CODE).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _alternating(columns: int, device: torch.device) -> torch.Tensor:
    """Return 1, -1, 1, ..., float32 ``[columns]``."""
    signs = torch.ones(columns, dtype=torch.float32, device="cpu")
    signs[1::2] = -1
    return signs.to(device)


def round_up_scale(values: torch.Tensor) -> torch.Tensor:
    """Return the least even bfloat16 values, as float32, not below positive float32 ``values``; NaN stays NaN."""
    bits = values.contiguous().view(torch.int32)
    # Rounding up would make -0 of a GPU's NaN, which has all bits set.
    return torch.where(values.isnan(), values, ((bits + 0x1FFFF) & ~0x1FFFF).view(torch.float32))


def quantise_sketch(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes ``[..., m]`` uint8, one a column, and one bfloat16 scale ``[..., 1]`` of columns ``[..., m]``."""
    wide = values.to(torch.float32)
    if not wide.shape[-1]:
        return wide.to(torch.uint8), wide.new_ones(*wide.shape[:-1], 1, dtype=torch.bfloat16)
    largest = wide.abs().amax(-1, keepdim=True)
    # Values relative to the largest have squares that neither overflow nor vanish.
    relative = wide / torch.where(largest > 0, largest, torch.ones_like(largest))
    rms = largest * relative.square().mean(-1, keepdim=True).sqrt()
    scale = torch.maximum(rms * STEP[bits], largest / REACH[bits]).to(torch.bfloat16)
    divisor = scale.to(torch.float32)
    steps = wide / torch.where(divisor > 0, divisor, torch.ones_like(divisor))
    half = 1 << (bits - 1)
    return (steps.floor().clamp(-half, half - 1) + half).to(torch.uint8), scale


def sketch_values(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the float32 values of sketch codes ``[..., m]`` with scales ``[..., 1]``."""
    return (codes.to(torch.float32) - ((1 << bits) - 1) / 2) * scale.to(torch.float32)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return uint8 ``[values]``, made once per device: a copy waits for the host, and a CUDA graph cannot record it."""
    return torch.tensor(values, dtype=torch.uint8, device=device)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes ``[..., m]`` as a little-endian bit stream ``[..., m * bits / 8]`` uint8 of whole bytes."""
    lead = codes.shape[:-1]
    places = _constant(tuple(range(bits)), codes.device)
    stream = ((codes[..., None] >> places) & 1).reshape(*lead, codes.shape[-1] * bits // 8, 8)
    weights = _constant(tuple(1 << place for place in range(8)), codes.device)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes ``[..., m]`` uint8 of a bit stream ``[..., m * bits / 8]``."""
    lead = packed.shape[:-1]
    eight = _constant(tuple(range(8)), packed.device)
    stream = ((packed[..., None] >> eight) & 1).reshape(*lead, packed.shape[-1] * 8 // bits, bits)
    weights = _constant(tuple(1 << place for place in range(bits)), packed.device)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _bytes(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
