"""Maps whose rows pass through a cache in bfloat16, to measure the cost of that precision."""

from collections.abc import Sequence

import torch

from sglang_tpla.reference_model.forward import CachedMaps, LayerMaps, Slicer
from sglang_tpla.reference_model.sketched_layer import SketchedMaps

CACHE_DTYPES = ("exact", "bf16")


def _bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


def cached_maps(maps: Sequence[LayerMaps], cache_dtype: str) -> list[LayerMaps]:
    """Pass the maps' rows through a cache: ``exact`` changes nothing, ``bf16`` rounds.

    Raises:
        ValueError: an unknown name.
    """
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"expected a cache dtype among {CACHE_DTYPES}, got {cache_dtype!r}")
    if cache_dtype == "exact":
        return list(maps)
    cached: list[LayerMaps] = []
    for layer in maps:
        if isinstance(layer, SketchedMaps):
            raise ValueError(f"sketched rows have a precision of their own: expected 'exact', got {cache_dtype!r}")
        cached.append(CachedMaps([(_rounded(z), a, b) for z, a, b in layer], _bf16))
    return cached


def _rounded(z_map: Slicer) -> Slicer:
    def sliced(latent: torch.Tensor) -> torch.Tensor:
        return _bf16(latent @ z_map if isinstance(z_map, torch.Tensor) else z_map(latent))

    return sliced
