"""The rows of every layer on a decode server and the maps that make them, from the artifact or for the whole latent.

Sketched rows come from an artifact made for them or, with one group and no artifact, from ``--tpla-rows sketched``:
plain MLA with an 8-bit cache, whose one map is the rotation that spreads a token's values evenly before rounding.
All other rows are plain.
"""

from dataclasses import dataclass

import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows
from sglang_tpla.cache_rows.rotation import rotation
from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.config import ConfigError
from sglang_tpla.host.process import Slice, artifact, settings


def sketched() -> bool:
    """Return whether this decode server caches sketched rows.

    Raises:
        ConfigError: ``--tpla-rows`` asks for other rows than the artifact was made for.
    """
    loaded, asked = artifact(), settings().rows
    if loaded is None:
        return asked == "sketched"
    found = loaded.meta.sketched
    if asked is not None and found != (asked == "sketched"):
        kind = "sketched" if found else "plain"
        raise ConfigError(
            f"--tpla-rows {asked} does not go with {settings().artifact}, which was made for {kind} rows; drop "
            f"--tpla-rows, or make one with `python -m sglang_tpla.calibrate --rows {asked}`"
        )
    return found


def row_format(latent_dim: int, rope_dim: int, layers: int, group: int = 0) -> RowFormat:
    """Return the rows of every layer on a rank of ``group``; their sizes are the same in every group.

    Args:
        latent_dim, rope_dim: the model's widths. layers: the number of layers.
    """
    loaded = artifact()
    if sketched():
        return RowFormat.sketched([sketched_rows(layer, latent_dim, rope_dim) for layer in range(layers)], group)
    widths = loaded.meta.widths if loaded is not None else (latent_dim,) * layers
    shared = loaded.meta.shared_dims if loaded is not None else widths
    return RowFormat.plain(widths, shared, rope_dim)


def sketched_rows(layer: int, latent_dim: int, rope_dim: int) -> SketchedRows:
    """Return the sizes of one layer's rows on a server of sketched rows."""
    loaded = artifact()
    return SketchedRows.of(latent_dim, 1, latent_dim, rope_dim) if loaded is None else loaded.meta.rows(layer)


@dataclass(frozen=True)
class LayerMaps:
    """One rank's maps of one layer, float32, in the form that its cache and its kernels need.

    Args:
        projection: ``[d, columns]`` makes the slice and, for sketched rows, the sketch columns of all groups after it.
        key_map: ``[query columns, d]`` is folded into the queries' absorbed weights; padded columns have zeros.
        value_map: ``[value columns, d]`` is folded into the values' absorbed weights; padded columns have zeros.
        rows: the cache's rows where they are sketched; None for plain rows.
    """

    projection: torch.Tensor
    key_map: torch.Tensor
    value_map: torch.Tensor
    rows: GroupRows | None


def layer_maps(part: Slice, layer: int, latent_dim: int, rope_dim: int) -> LayerMaps:
    """Return the maps of one layer on one rank, on the CPU even where SGLang's default device is a GPU."""
    if part.artifact is None:
        turn = rotation(latent_dim, torch.float32)
        rows = sketched_rows(layer, latent_dim, rope_dim)
        z, a, b, sketch = turn, turn.T.contiguous(), turn.T.contiguous(), turn[:, :0]
    else:
        z, a, b = part.artifact.maps(layer, part.group)
        if not part.artifact.meta.sketched:
            return LayerMaps(z, a, b, None)
        rows, sketch = part.artifact.meta.rows(layer), part.artifact.sketch(layer)
    padding = a.new_zeros(rows.w_pad - rows.w, latent_dim)
    return LayerMaps(
        projection=torch.cat([z, sketch], dim=1),
        key_map=torch.cat([a[: rows.w], padding, a[rows.w :]]),
        value_map=torch.cat([b, padding]),
        rows=GroupRows(rows, part.group),
    )
