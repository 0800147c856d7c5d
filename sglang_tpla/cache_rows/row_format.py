"""How a cache row is encoded, apart from how rows move: what its items are, and which of them make up each part.

    PLAIN   items of the pool's dtype   [w latent | rope]
    FP8     bytes                       [w e4m3 | rope bfloat16 | scale of the shared, of the own columns | zeros]
                                        (`attention.fp8_rows`)

A receiver announces its format; the sender projects in float32 and encodes straight from that, so values are rounded
once and FP8 rows are bytes from the sender's gather on.
"""

from __future__ import annotations

import enum

import torch

from sglang_tpla.cache_rows import fp8 as fp8_rows
from sglang_tpla.cache_rows.parts import Part, part_columns

FP8_NAME = "fp8_rows"  # in the place of a dtype's name, where formats are announced
SENDER_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
)  # of a pool whose rows are sent in another format


class RowFormat(enum.Enum):
    """Encoding of one token's row of one layer."""

    PLAIN = "plain"
    FP8 = FP8_NAME

    @classmethod
    def announced(cls, name: str) -> RowFormat:
        """The format that a receiver announced in the place of its dtype."""
        return cls.FP8 if name == FP8_NAME else cls.PLAIN

    def name_of(self, dtype: torch.dtype) -> str:
        """What a receiver with a pool of this dtype announces."""
        return FP8_NAME if self is RowFormat.FP8 else str(dtype).removeprefix("torch.")

    def item_dtype(self, sender: torch.dtype) -> torch.dtype:
        """Type of one item of a row, where the sender's pool has dtype ``sender``."""
        return torch.uint8 if self is RowFormat.FP8 else sender

    def width(self, items: int, rope_dim: int) -> int:
        """Latent values of a row of so many items."""
        return fp8_rows.slice_width(items, rope_dim) if self is RowFormat.FP8 else items - rope_dim

    def objection(self, width: int, rope_dim: int) -> str | None:
        """Why rows of this width cannot be encoded so, or None."""
        return fp8_rows.objection(width, rope_dim) if self is RowFormat.FP8 else None

    def columns(self, width: int, shared: int, rope_dim: int, part: Part) -> tuple[tuple[int, int], ...]:
        """Ranges of the row's items that a part fills, in payload order; empty ranges left out."""
        if self is RowFormat.PLAIN:
            return part_columns(width, shared, rope_dim, part)
        scales = width + 2 * rope_dim
        middle = scales + fp8_rows.SCALE_BYTES
        ranges = {
            Part.FULL: ((0, fp8_rows.row_bytes(width, rope_dim)),),
            Part.COMMON: ((0, shared), (width, middle)),
            Part.OWN: ((shared, width), (middle, middle + fp8_rows.SCALE_BYTES)) if shared < width else (),
        }[part]
        return tuple((start, stop) for start, stop in ranges if stop > start)

    def part_items(self, width: int, shared: int, rope_dim: int, part: Part) -> int:
        """Items a token and layer of one part."""
        return sum(stop - start for start, stop in self.columns(width, shared, rope_dim, part))

    def encode(
        self, z: torch.Tensor, k_rope: torch.Tensor, shared: int, part: Part, out: torch.Tensor
    ) -> None:
        """Write one part of each row.

        Args:
            z: ``[..., columns]``, the part's latent columns, float32 (or the pool's dtype, where they are raw).
            k_rope: ``[..., rope]``, unused in a group's own part.
            shared: how many of a row's leading columns every group has.
            out: ``[..., part_items]``.
        """
        if self is RowFormat.FP8:
            match part:
                case Part.FULL:
                    out.copy_(fp8_rows.pack_rows(z, k_rope, shared))
                case Part.COMMON:
                    out.copy_(fp8_rows.pack_common(z, k_rope))
                case Part.OWN:
                    out.copy_(fp8_rows.pack_own(z))
            return
        width = z.shape[-1]
        out[..., :width] = z
        if part is not Part.OWN:
            out[..., width:] = k_rope
