"""Closed-form maps of sketched rows of one layer, from its second moments.

t = c U with U the score-energy basis (``transforms.score_basis``) of the latent's second moment, so that every column
has mean square 1; the first r columns are shared, the others are dealt out in turn. (Not of its covariance: a mean
costs resolution like anything else, and this way most of it lies in the shared columns.) A part of a row is rounded
with one scale a token, so columns are weighted first and rotated then, which spreads a part's energy and its rounding
evenly over its columns. With e_j the root mean square of what queries make of column j, weights w_j give a score
error of (sum w_j^2)(sum e_j^2 / w_j^2), least at w_j = sqrt(e_j): the sketch, which takes part in scores alone, has
these. The 8-bit columns also make the values, where all columns count alike; they have the geometric mean of both,
e_j^(1/4). The maps back are exact, so all that is lost is rounding:

    key map   A_i = [shared^-1; own_i^-1; sketch_j^-1 for j != i]: c = [z_i | sketch] A_i but for rounding
    value map B_i = [shared^-1 / g; own_i^-1]: the groups' values add up to c
"""

from __future__ import annotations

import torch

from sglang_tpla.cache_rows.rotation import rotation
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.calibrate.transforms import Basis, TransformError, score_basis
from sglang_tpla.measure.statistics import LayerMoments
from sglang_tpla.reference_model.sketched_layer import SketchedMaps

SKETCH_POWER, KEPT_POWER = 0.5, 0.25  # of a column's score energy: its weight in the sketch, and at 8 bits
_LEAST_ENERGY = 1e-6  # of the largest: a column that no query sees keeps a finite weight


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


def default_shared(latent_dim: int, groups: int) -> int:
    """r when none is given: a quarter of the latent but 64 at most, the nearest that the format holds.

    Whole bytes at every number of bits are preferred: blocks of a multiple of eight columns.
    """
    if groups == 1:
        return latent_dim
    wanted = min(latent_dim // 4, 64)
    choices = shared_choices(latent_dim, groups)
    even = [choice for choice in choices if (latent_dim - choice) // groups % 8 == 0 and choice < latent_dim]
    near = [choice for choice in even if abs(choice - wanted) <= wanted // 4] or choices
    return min(near, key=lambda choice: (abs(choice - wanted), choice))


def layer_sketched_maps(moments: LayerMoments, w_uk: torch.Tensor, rows: SketchedRows) -> SketchedMaps:
    """Maps of one layer, float64.

    Args:
        moments: the layer's statistics.
        w_uk: key half of kv_b_proj, [H, n, d].
        rows: sizes of the rows.
    """
    queries = moments.absorbed_queries(w_uk)
    basis = score_basis(moments.latent_outer / max(moments.latent_count, 1), queries)
    # what queries make of each column: their root mean square along its row of the inverse
    energy = torch.einsum("jd,de,je->j", basis.inverse, queries, basis.inverse).clamp_min(0).sqrt()
    energy = energy.clamp_min(energy.max() * _LEAST_ENERGY)
    kept, sketched = (_weighted(basis, energy**power) for power in (KEPT_POWER, SKETCH_POWER))
    return _maps(kept, sketched, rows)


def _weighted(basis: Basis, weights: torch.Tensor) -> Basis:
    return Basis(basis.forward * weights, basis.inverse / weights[:, None])


def _maps(kept: Basis, sketched: Basis, rows: SketchedRows) -> SketchedMaps:
    shared, groups = rows.shared, rows.groups
    columns = [list(range(shared + group, rows.latent_dim, groups)) for group in range(groups)]
    if groups == 1:
        columns = [[]]
    shared_rotation, own_rotation = rotation(shared), rotation(rows.own)
    z_shared = kept.forward[:, :shared] @ shared_rotation
    back_shared = shared_rotation.T @ kept.inverse[:shared]
    z_own = [kept.forward[:, picked] @ own_rotation for picked in columns]
    back_own = [own_rotation.T @ kept.inverse[picked] for picked in columns]
    sketch = [sketched.forward[:, picked] @ own_rotation for picked in columns]
    back_sketch = [own_rotation.T @ sketched.inverse[picked] for picked in columns]
    return SketchedMaps(
        rows=rows,
        z=[torch.cat([z_shared, own], 1) for own in z_own],
        sketch=torch.cat(sketch, 1),
        a=[
            torch.cat([back_shared, own, *(back for j, back in enumerate(back_sketch) if j != i)])
            for i, own in enumerate(back_own)
        ],
        b=[torch.cat([back_shared / groups, own]) for own in back_own],
    )
