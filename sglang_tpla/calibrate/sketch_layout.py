"""Sizes of sketched rows: which the format holds, and which to take when none are given.

How many columns want 8 bits on every rank differs from model to model, and the statistics tell: they give the noise
that the sketch's rounding adds to a score (``sketch_noise``). Where a quarter of the columns shared leaves little of
it, that is the layout. Where it does not (a tight latent, sharp attention), bytes are better spent on shared columns
than on the second byte of the rotary key's values, whose rounding to 8 bits costs less than the sketch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.transforms import TransformError

# mean square error of Lloyd and Max's levels, of a Gaussian's variance, by bits
DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497}
QUIET = 1e-3  # square nats of a score: some 0.0002 to 0.0003 nats of KL a token on three small models
_ROPE_BITS = 16


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


def sketch_noise(energies: Sequence[torch.Tensor], rows: SketchedRows, scale: float) -> float:
    """The variance that a sketch's rounding adds to a score, mean over layers.

    Args:
        energies: of each layer, what queries make of each column, their root mean square, descending, [d].
        rows: sizes of the rows.
        scale: the softmax scale.
    """
    if not rows.own:
        return 0.0
    left = [energy[rows.shared :].sum().item() ** 2 / (rows.latent_dim - rows.shared) for energy in energies]
    others = (rows.groups - 1) / rows.groups
    return scale**2 * others * DISTORTION[rows.sketch_bits] * sum(left) / len(left)


def usual_rows(
    energies: Sequence[torch.Tensor],
    scale: float,
    rope_dim: int,
    groups: int,
    sketch_bits: int,
    rope_bits: int | None = None,
    shared_dims: int | None = None,
) -> SketchedRows:
    """The rows of these settings, what is None chosen: with no more bytes than a quarter shared and a key of 16 bits.

    Where a quarter shared is noisy, the rotary key has 8 bits and what that saves is spent on shared columns, up to
    three quarters. Who asks for 8 bits wants few bytes and gets three eighths shared.

    Raises:
        TransformError: the format does not hold them.
    """
    latent_dim = len(energies[0])

    def made(shared: int, key: int) -> SketchedRows:
        return sketched_rows(latent_dim, rope_dim, groups, shared, sketch_bits, key)

    if shared_dims is not None:
        return made(shared_dims, rope_bits or _ROPE_BITS)
    usual = made(default_shared(latent_dim, groups, sketch_bits), rope_bits or _ROPE_BITS)
    usual = _filled(usual)
    if rope_bits == _ROPE_BITS or sketch_noise(energies, usual, scale) <= QUIET:
        return usual
    held = shared_choices(latent_dim, groups, sketch_bits)
    eighths = [r for r in held if r % max(latent_dim // 8, 1) == 0] or held
    most = 3 * latent_dim // (4 if rope_bits is None else 8)
    wide = [made(r, 8) for r in eighths if usual.shared < r <= most]
    if rope_bits is None:
        quarter = nearest_shared(latent_dim, groups, latent_dim // 4, sketch_bits)
        bound = made(quarter, _ROPE_BITS).row_bytes
        wide = [rows for rows in wide if rows.row_bytes <= bound]
    return wide[-1] if wide else usual


def _filled(rows: SketchedRows) -> SketchedRows:
    """Those of as many bytes that share most: what would be padding is put to use."""
    for shared in range(rows.latent_dim - 1, rows.shared, -1):
        own = (rows.latent_dim - shared) // rows.groups
        if own % 8 == 0 and shared + rows.groups * own == rows.latent_dim:
            wider = replace(rows, shared=shared, own=own)
            if wider.row_bytes <= rows.row_bytes:
                return wider
    return rows
