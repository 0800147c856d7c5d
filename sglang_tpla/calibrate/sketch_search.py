"""Choose a layout of sketched rows: the fewest bytes a token and rank that keep KL under a bound.

The search runs for every g that divides the ranks, with rotary keys of 16 and of 8 bits. It measures each layer's KL
with only that layer in sketched rows, for every pair of r shared columns and b sketch bits that is worth its bytes. The
layers' KL nearly add up, so a greedy walk gives layouts layer by layer: it starts at the smallest rows, and each step
enlarges the layer that buys most KL a byte. Uniform layouts and the walk's layouts near the bound are then measured
whole. One group (plain MLA with an 8-bit cache, which needs no artifact) is measured beside them, because g > 1 has to
beat it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_tpla.cache_rows.sketched import ROPE_BITS, SKETCH_BITS, SketchedRows
from sglang_tpla.calibrate.layout_search import Point, Search, measured_layouts
from sglang_tpla.calibrate.rounding_cost import LayerCosts
from sglang_tpla.calibrate.sketch_layout import shared_choices
from sglang_tpla.calibrate.sketch_maps import layer_sketched_maps
from sglang_tpla.calibrate.transforms import TransformError
from sglang_tpla.reference_model.forward import PlainModel

# r as shares of d that are looked at, by the rotary key's bits: the bytes that 8 bits save may go to shared columns
_SHARES = {16: (0.125, 0.25, 0.375), 8: (0.25, 0.5, 0.75)}


@dataclass(frozen=True)
class SketchedSearch:
    """The sketched rows that may be chosen; `Search` has the ranks and the bound.

    Args:
        bits: sketch bits that are looked at.
        rope_bits: bits of the rotary key that are looked at, the same in every layer of a layout.
        shared: the one r that is looked at, or None for a few shares of d.
    """

    bits: tuple[int, ...] = SKETCH_BITS
    rope_bits: tuple[int, ...] = ROPE_BITS
    shared: int | None = None

    def choices(self, latent_dim: int, rope_dim: int, groups: int, rope_bits: int) -> list[SketchedRows]:
        """Return rows by size, ascending; of one size, those with most bits, then with most shared columns."""
        found: dict[int, SketchedRows] = {}
        for bits in self.bits:
            held = shared_choices(latent_dim, groups, bits)
            for share in _SHARES[rope_bits] if self.shared is None else (self.shared / latent_dim,):
                if not held:
                    continue
                shared = min(held, key=lambda choice, share=share: abs(choice - share * latent_dim))  # type: ignore[misc]
                rows = SketchedRows.of(latent_dim, groups, shared, rope_dim, sketch_bits=bits, rope_bits=rope_bits)
                best = found.get(rows.row_bytes)
                if best is None or (rows.sketch_bits, rows.shared) > (best.sketch_bits, best.shared):
                    found[rows.row_bytes] = rows
        return [found[size] for size in sorted(found)]


def search_sketched(
    model: PlainModel,
    costs: Sequence[LayerCosts],
    tokens: torch.Tensor,
    prompt_tokens: int,
    wanted: Search,
    looked_at: SketchedSearch,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Return every layout measured, the fewest bytes first; those of one group are for comparison.

    Raises:
        TransformError: no number of groups has rows that the format holds.
    """
    points: list[Point] = []
    for groups in (1, *wanted.group_counts()):
        for rope_bits in looked_at.rope_bits:
            points += _search_groups(
                model, costs, tokens, prompt_tokens, wanted, looked_at, groups, rope_bits, progress
            )
    if not any(point.groups > 1 for point in points):
        raise TransformError(
            f"no number of groups that divides {wanted.ranks} ranks has sketched rows of {model.spec.latent_dim} values"
        )
    return sorted(points, key=lambda point: (point.bytes_per_token, point.kl))


def _search_groups(
    model: PlainModel,
    costs: Sequence[LayerCosts],
    tokens: torch.Tensor,
    prompt_tokens: int,
    wanted: Search,
    looked_at: SketchedSearch,
    groups: int,
    rope_bits: int,
    progress: Callable[[str], None],
) -> list[Point]:
    spec = model.spec
    choices = looked_at.choices(spec.latent_dim, spec.rope_dim, groups, rope_bits)[: 1 if groups == 1 else None]
    if not choices:
        return []
    maps = [[layer_sketched_maps(layer, rows).to(model.device, model.dtype) for layer in costs] for rows in choices]
    name = f"g = {groups}, key of {rope_bits} bits"
    sizes = [rows.row_bytes for rows in choices]
    found = measured_layouts(
        model, tokens, prompt_tokens, maps, sizes, wanted.max_kl, lambda line: progress(f"{name}: {line}")
    )
    return [
        Point(
            groups=groups,
            shared_dims=tuple(choices[choice].shared for choice in pick),
            widths=tuple(choices[choice].w for choice in pick),
            bytes_per_token=sum(choices[choice].row_bytes for choice in pick),
            kl=kl,
            rows=tuple(choices[choice] for choice in pick),
        )
        for pick, kl in found
    ]
