"""Sketched rows in the reference forward: each group's view of tokens after rounding to the row format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sglang_tpla.cache_rows.sketched import (
    SketchedRows,
    byte_values,
    quantise,
    quantise_in_turns,
    quantise_sketch,
    sketch_values,
)


@dataclass(frozen=True)
class GroupView:
    """The latents [B, S, d] of one group's scores (``key``) and values (``value``), and its keys [B, S, rope]."""

    key: torch.Tensor
    value: torch.Tensor
    k_rope: torch.Tensor


@dataclass(frozen=True)
class SketchedMaps:
    """Maps of one layer in sketched rows.

    Args:
        rows: sizes of the layer's rows.
        z: projection of each group, [d, w].
        sketch: sketch map of all groups, [d, g n].
        a: key map of each group, [w + (g - 1) n, d].
        b: value map of each group, [w, d].
    """

    rows: SketchedRows
    z: Sequence[torch.Tensor]
    sketch: torch.Tensor
    a: Sequence[torch.Tensor]
    b: Sequence[torch.Tensor]

    def to(self, device: torch.device, dtype: torch.dtype) -> SketchedMaps:
        z, a, b = ([part.to(device, dtype) for part in parts] for parts in (self.z, self.a, self.b))
        return SketchedMaps(self.rows, z, self.sketch.to(device, dtype), a, b)

    def views(self, latent: torch.Tensor, k_rope: torch.Tensor) -> Iterator[GroupView]:
        """Yield each group's view of latents [B, S, d] and rotated keys [B, S, rope], in their dtype."""
        rows, dtype = self.rows, latent.dtype
        # Round shared columns, rotary key and sketch once, because all groups have them.
        shared = _in_turns(rows, latent @ self.z[0][:, : rows.shared])
        keys = _in_turns(rows, k_rope) if rows.rope_bits == 8 else [k_rope.to(torch.bfloat16).to(dtype)]
        codes, scale = quantise_sketch(latent @ self.sketch, rows.sketch_bits)
        blocks = sketch_values(codes, scale, rows.sketch_bits).to(dtype).split(max(rows.own, 1), dim=-1)
        for group, (z, a, b) in enumerate(zip(self.z, self.a, self.b, strict=True)):
            kept = torch.cat([shared[group % rows.turns], rounded(latent @ z[:, rows.shared :])], dim=-1)
            others = [block for index, block in enumerate(blocks) if index != group] if rows.own else []
            yield GroupView(torch.cat([kept, *others], dim=-1) @ a, kept @ b, keys[group % rows.key_turns])


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Round columns as an 8-bit row does, and return them in their dtype."""
    return byte_values(*quantise(values)).to(values.dtype)


def _in_turns(rows: SketchedRows, values: torch.Tensor) -> list[torch.Tensor]:
    codes, scale = quantise_in_turns(rows, values)
    return [byte_values(turn, scale).to(values.dtype) for turn in codes]
