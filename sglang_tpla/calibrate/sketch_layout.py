"""The sizes of sketched rows: those that the format can hold, and the defaults of calibration.

Models differ in how many columns need 8 bits on every rank and in how fine a sketch the other columns need. The
statistics show both, because they give the cost of each part's rounding (`rounding_cost`), and there are three cases:

* With a quarter of the columns shared, the sketch adds little noise: every layer has that layout.
* The sketch adds little noise, but other shares and bits layer by layer cost far less at about as many bytes: each
  layer has a separate layout.
* The sketch is noisy (a tight latent, sharp attention): the rotary key has 8 bits, which cost less than the sketch
  does, and the bytes that this saves are spent on shared columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sglang_tpla.cache_rows.shared_columns import default_shared, nearest_shared, shared_choices
from sglang_tpla.cache_rows.sketched import SKETCH_BITS, SketchedRows
from sglang_tpla.calibrate.layout_search import widening_walk
from sglang_tpla.calibrate.rounding_cost import LayerCosts
from sglang_tpla.calibrate.transforms import TransformError

QUIET = 1e-3  # square nats of a score; they cost 0.0002 to 0.0003 nats of KL a token on three small models
_ROPE_BITS, _SKETCH_BITS = 16, 4
_WORTH_LAYERS = 0.72  # rows by layer are taken only if they cost less than this share of the usual rows' cost


def sketched_rows(
    latent_dim: int, rope_dim: int, groups: int, shared_dims: int, sketch_bits: int, rope_bits: int
) -> SketchedRows:
    """Return the rows of these settings.

    Raises:
        TransformError: the format cannot hold them; the message names the nearest shared dims that it can hold.
    """
    try:
        return SketchedRows.of(latent_dim, groups, shared_dims, rope_dim, sketch_bits=sketch_bits, rope_bits=rope_bits)
    except ValueError as error:
        near = sorted(shared_choices(latent_dim, groups, sketch_bits), key=lambda choice: abs(choice - shared_dims))[:3]
        raise TransformError(
            f"{error}; the nearest --shared-dims that {groups} groups hold are {sorted(near) or 'none'}"
        ) from error


def usual_rows(
    costs: Sequence[LayerCosts],
    rope_dim: int,
    groups: int,
    sketch_bits: int | None = None,
    rope_bits: int | None = None,
    shared_dims: int | None = None,
) -> list[SketchedRows]:
    """Return the rows of every layer at these settings, and choose the settings that are None.

    If the sketch is noisy with a quarter shared, the rotary key has 8 bits, and the bytes that this saves are spent on
    shared columns, up to three quarters of all. A user who asks for 8 bits wants few bytes and gets three eighths.

    Raises:
        TransformError: the format cannot hold such rows.
    """
    latent_dim = len(costs[0].in_scores)
    bits = sketch_bits or _SKETCH_BITS

    def made(shared: int, key: int) -> SketchedRows:
        return sketched_rows(latent_dim, rope_dim, groups, shared, bits, key)

    if shared_dims is not None:
        return [made(shared_dims, rope_bits or _ROPE_BITS)] * len(costs)
    usual = made(default_shared(latent_dim, groups, bits), rope_bits or _ROPE_BITS)
    if rope_bits == _ROPE_BITS or sketch_noise(costs, usual) <= QUIET:
        usual = _filled(usual)
        return _by_layer(costs, usual) if sketch_bits is rope_bits is None else [usual] * len(costs)
    held = shared_choices(latent_dim, groups, bits)
    eighths = [r for r in held if r % max(latent_dim // 8, 1) == 0] or held
    most = 3 * latent_dim // (4 if rope_bits is None else 8)
    wide = [made(r, 8) for r in eighths if usual.shared < r <= most]
    if rope_bits is None:
        quarter = nearest_shared(latent_dim, groups, latent_dim // 4, bits)
        bound = made(quarter, _ROPE_BITS).row_bytes
        wide = [rows for rows in wide if rows.row_bytes <= bound]
    return [wide[-1] if wide else usual] * len(costs)


def sketch_noise(costs: Sequence[LayerCosts], rows: SketchedRows) -> float:
    """Return the variance that a sketch's rounding adds to a score, averaged over layers."""
    return sum(layer.sketch(rows) for layer in costs) / len(costs)


def _by_layer(costs: Sequence[LayerCosts], usual: SketchedRows) -> list[SketchedRows]:
    """Return the rows that lower rounding's cost most for their bytes, layer by layer; the usual ones for a small gain.

    An early layer's error passes the experts' routing of every later layer, so it counts once for each such layer.
    """
    layers = [usual] * len(costs)
    choices = [] if usual.groups == 1 else _even_rows(usual)
    if not choices:
        return layers
    columns = {rows.shared: [layer.columns(rows) for layer in costs] for rows in (*choices, usual)}  # at any bits

    def cost(index: int, rows: SketchedRows) -> float:
        return (len(costs) - index) * (columns[rows.shared][index] + costs[index].sketch(rows))

    sizes = sorted({rows.row_bytes for rows in choices})
    of_size = [[rows for rows in choices if rows.row_bytes == size] for size in sizes]
    best = [[min(alike, key=partial(cost, index)) for alike in of_size] for index in range(len(costs))]
    walk = widening_walk([[cost(index, rows) for rows in layer] for index, layer in enumerate(best)], sizes)
    bound = len(costs) * _most_bytes(usual)
    held = [pick for pick in walk if sum(sizes[choice] for choice in pick) <= bound]
    if not held:
        return layers
    picked = [best[index][choice] for index, choice in enumerate(held[-1])]
    now, then = (sum(cost(index, rows) for index, rows in enumerate(rows_of)) for rows_of in (layers, picked))
    return picked if then < _WORTH_LAYERS * now else layers


def _even_rows(usual: SketchedRows) -> list[SketchedRows]:
    """Return rows whose blocks are multiples of eight columns, with r a multiple of a sixteenth of d."""
    d, groups = usual.latent_dim, usual.groups
    return [
        replace(usual, shared=shared, own=(d - shared) // groups, sketch_bits=bits)
        for bits in SKETCH_BITS
        for shared in range(0, d, max(d // 16, 1))
        if (d - shared) % (8 * groups) == 0
    ]


def _most_bytes(usual: SketchedRows) -> float:
    """Return the most bytes, averaged over layers, that a row chosen by layer may have.

    Two bounds hold: the usual rows' bytes plus a fiftieth of plain MLA's, and 56, 52 or 50 hundredths of plain MLA's at
    two, four or eight groups. The bytes of the usual rows are always allowed.
    """
    mla = 2 * (usual.latent_dim + usual.rope_dim)
    return max(min(usual.bare_bytes + mla / 50, mla * (0.48 + 0.16 / usual.groups)), usual.bare_bytes)


def _filled(rows: SketchedRows) -> SketchedRows:
    """Return the rows of no more bytes that share most columns, so that padding is put to use."""
    for shared in range(rows.latent_dim - 1, rows.shared, -1):
        own = (rows.latent_dim - shared) // rows.groups
        if own % 8 == 0 and shared + rows.groups * own == rows.latent_dim:
            wider = replace(rows, shared=shared, own=own)
            if wider.row_bytes <= rows.row_bytes:
                return wider
    return rows
