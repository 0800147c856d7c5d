"""The sketched rows among which `layout_search` chooses.

The candidates are, for every g that divides the ranks and for rotary keys of 16 and of 8 bits, the pairs of r shared
columns and b sketch bits that are worth their bytes. One group (plain MLA with an 8-bit cache, which needs no artifact)
is measured as well, because g > 1 has to beat it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sglang_tpla.cache_rows.shared_columns import shared_choices
from sglang_tpla.cache_rows.sketched import ROPE_BITS, SKETCH_BITS, SketchedRows
from sglang_tpla.calibrate.layout_search import LookedAt

# Candidates for r as shares of d, by the rotary key's bits: the bytes that 8 bits save may go to shared columns.
_SHARES = {16: (0.125, 0.25, 0.375), 8: (0.25, 0.5, 0.75)}


@dataclass(frozen=True)
class SketchedSearch:
    """The sketched rows that may be chosen.

    Args:
        bits: the candidates for sketch bits.
        rope_bits: the candidates for the rotary key's bits, the same in every layer of a layout.
        shared: the only candidate for r, if the format can hold it, or None for a few shares of d.
    """

    bits: tuple[int, ...] = SKETCH_BITS
    rope_bits: tuple[int, ...] = ROPE_BITS
    shared: int | None = None

    def looked_at(self, latent_dim: int, rope_dim: int, group_counts: Sequence[int]) -> Iterable[LookedAt]:
        """Yield the rows of one group and of every other g, for each of ``rope_bits``."""
        for groups in (1, *group_counts):
            for bits in self.rope_bits:
                if choices := self.choices(latent_dim, rope_dim, groups, bits):
                    yield f"g = {groups}, key of {bits} bits", groups, choices

    def choices(self, latent_dim: int, rope_dim: int, groups: int, rope_bits: int) -> list[SketchedRows]:
        """Return rows by ascending size; for each size, those with the most bits, then the most shared columns."""
        found: dict[int, SketchedRows] = {}
        for bits in self.bits:
            held = shared_choices(latent_dim, groups, bits)
            if groups > 1 and self.shared is not None and self.shared not in held:
                continue
            for share in _SHARES[rope_bits] if self.shared is None else (self.shared / latent_dim,):
                shared = min(held, key=lambda choice, share=share: abs(choice - share * latent_dim))  # type: ignore[misc]
                rows = SketchedRows.of(latent_dim, groups, shared, rope_dim, sketch_bits=bits, rope_bits=rope_bits)
                best = found.get(rows.row_bytes)
                if best is None or (rows.sketch_bits, rows.shared) > (best.sketch_bits, best.shared):
                    found[rows.row_bytes] = rows
        return [found[size] for size in sorted(found)]
