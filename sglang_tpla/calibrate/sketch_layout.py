"""Sizes of sketched rows: which the format holds, and which to take when none are given.

How many columns want 8 bits on every rank, and how fine a sketch the others need, differs from model to model, and the
statistics tell: they give what each part's rounding costs (``rounding_cost``). Where a quarter of the columns shared
leaves the sketch little noise, rows of that size share as many columns and have as fine a sketch as cost least. Where
it does not (a tight latent, sharp attention), bytes are better spent on shared columns than on the second byte of the
rotary key's values, whose rounding to 8 bits costs less than the sketch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sglang_tpla.cache_rows.sketched import SKETCH_BITS, SketchedRows
from sglang_tpla.calibrate.rounding_cost import LayerCosts
from sglang_tpla.calibrate.transforms import TransformError

QUIET = 1e-3  # square nats of a score: some 0.0002 to 0.0003 nats of KL a token on three small models
_ROPE_BITS, _SKETCH_BITS = 16, 4
_WORTH_FEWER_BITS = 0.9  # of what 4 bits cost: gains below are within the estimate's error


def sketched_rows(
    latent_dim: int, rope_dim: int, groups: int, shared_dims: int, sketch_bits: int, rope_bits: int
) -> SketchedRows:
    """The rows of these settings.

    Raises:
        TransformError: the format does not hold them; the message says which shared dims it does hold.
    """
    try:
        return SketchedRows.of(
            latent_dim, groups, shared_dims, rope_dim, sketch_bits=sketch_bits, rope_bits=rope_bits
        )
    except ValueError as error:
        near = sorted(
            shared_choices(latent_dim, groups, sketch_bits), key=lambda choice: abs(choice - shared_dims)
        )[:3]
        raise TransformError(
            f"{error}; the nearest --shared-dims that {groups} groups hold are {sorted(near) or 'none'}"
        ) from error


def shared_choices(latent_dim: int, groups: int, sketch_bits: int = 4) -> list[int]:
    """Every r that g groups of sketched rows hold, ascending; d (all columns shared) is the last."""
    return [
        shared
        for shared in range(latent_dim + 1)
        if (latent_dim - shared) % groups == 0 and (latent_dim - shared) // groups * sketch_bits % 8 == 0
    ]


def default_shared(latent_dim: int, groups: int, sketch_bits: int = 4) -> int:
    """r of a quiet model when none is given: a quarter of the latent but 64 at most."""
    if groups == 1:
        return latent_dim
    return nearest_shared(latent_dim, groups, min(latent_dim // 4, 64), sketch_bits)


def nearest_shared(latent_dim: int, groups: int, wanted: int, sketch_bits: int = 4) -> int:
    """The r nearest to the one wanted that the format holds.

    Whole bytes at every number of bits are preferred: blocks of a multiple of eight columns.
    """
    choices = shared_choices(latent_dim, groups, sketch_bits)
    even = [choice for choice in choices if (latent_dim - choice) // groups % 8 == 0 and choice < latent_dim]
    near = [choice for choice in even if abs(choice - wanted) <= wanted // 4] or choices
    return min(near, key=lambda choice: (abs(choice - wanted), -choice))


def usual_rows(
    costs: Sequence[LayerCosts],
    rope_dim: int,
    groups: int,
    sketch_bits: int | None = None,
    rope_bits: int | None = None,
    shared_dims: int | None = None,
) -> SketchedRows:
    """The rows of these settings, what is None chosen: with no more bytes than a quarter shared and a key of 16 bits.

    Where a quarter shared is noisy, the rotary key has 8 bits and what that saves is spent on shared columns, up to
    three quarters. Who asks for 8 bits wants few bytes and gets three eighths shared.

    Raises:
        TransformError: the format does not hold them.
    """
    latent_dim = len(costs[0].in_scores)
    bits = sketch_bits or _SKETCH_BITS

    def made(shared: int, key: int) -> SketchedRows:
        return sketched_rows(latent_dim, rope_dim, groups, shared, bits, key)

    if shared_dims is not None:
        return made(shared_dims, rope_bits or _ROPE_BITS)
    usual = made(default_shared(latent_dim, groups, bits), rope_bits or _ROPE_BITS)
    if groups == 1:
        return usual
    if rope_bits == _ROPE_BITS or sketch_noise(costs, usual) <= QUIET:
        return _least_rounding(costs, usual, SKETCH_BITS if sketch_bits is None else (bits,))
    held = shared_choices(latent_dim, groups, bits)
    eighths = [r for r in held if r % max(latent_dim // 8, 1) == 0] or held
    most = 3 * latent_dim // (4 if rope_bits is None else 8)
    wide = [made(r, 8) for r in eighths if usual.shared < r <= most]
    if rope_bits is None:
        quarter = nearest_shared(latent_dim, groups, latent_dim // 4, bits)
        bound = made(quarter, _ROPE_BITS).row_bytes
        wide = [rows for rows in wide if rows.row_bytes <= bound]
    return wide[-1] if wide else usual


def sketch_noise(costs: Sequence[LayerCosts], rows: SketchedRows) -> float:
    """The variance that a sketch's rounding adds to a score, mean over layers."""
    return sum(layer.sketch(rows) for layer in costs) / len(costs)


def _least_rounding(
    costs: Sequence[LayerCosts], usual: SketchedRows, sketch_bits: Sequence[int]
) -> SketchedRows:
    """Of the rows with as many bytes as the usual ones at most, those whose rounding costs least."""
    d, groups = usual.latent_dim, usual.groups
    columns: dict[int, float] = {}  # by r
    best: dict[int, tuple[float, SketchedRows]] = {}  # by bits
    for bits in sketch_bits:
        for shared in shared_choices(d, groups, bits):
            own = (d - shared) // groups
            even = own % 8 == 0 and shared % max(d // 16, 1) == 0 and own
            rows = replace(usual, shared=shared, own=own, sketch_bits=bits)
            if not (even or rows == usual) or rows.row_bytes > usual.row_bytes:
                continue
            if shared not in columns:
                columns[shared] = sum(layer.columns(rows) for layer in costs) / len(costs)
            cost = columns[shared] + sketch_noise(costs, rows)
            if bits not in best or cost < best[bits][0]:
                best[bits] = cost, rows
    least, rows = min(best.values(), key=lambda choice: choice[0])
    usual_least, usual_best = best[usual.sketch_bits]
    return rows if least < _WORTH_FEWER_BITS * usual_least else usual_best
