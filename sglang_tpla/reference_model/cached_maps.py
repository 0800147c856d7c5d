"""Maps whose rows pass through a cache of lower precision, to measure the cost of that precision.

The rotary key is bfloat16 in both; slices are bfloat16 or FP8 (`cache_rows.fp8`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from sglang_tpla.cache_rows.fp8 import rounded
from sglang_tpla.reference_model.forward import CachedMaps, LayerMaps, Slicer
from sglang_tpla.reference_model.sketched_layer import SketchedMaps

CACHE_DTYPES = ("exact", "bf16", "fp8")


def _bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


def cached_maps(maps: Sequence[LayerMaps], cache_dtype: str, shared: Sequence[int]) -> list[LayerMaps]:
    """Pass the maps' rows through a cache: ``exact`` changes nothing, ``bf16`` and ``fp8`` round.

    Args:
        shared: number of leading columns that every group has, one entry a layer; these have their own scale.

    Raises:
        ValueError: an unknown name.
    """
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"expected a cache dtype among {CACHE_DTYPES}, got {cache_dtype!r}")
    if cache_dtype == "exact":
        return list(maps)
    cached: list[LayerMaps] = []
    for layer, common in zip(maps, shared, strict=True):
        if isinstance(layer, SketchedMaps):
            raise ValueError(f"sketched rows have a precision of their own: expected 'exact', got {cache_dtype!r}")
        rounding = partial(rounded, shared=common) if cache_dtype == "fp8" else _bf16
        cached.append(CachedMaps([(_through(z, rounding), a, b) for z, a, b in layer], _bf16))
    return cached


def _through(z_map: Slicer, rounding: Callable[[torch.Tensor], torch.Tensor]) -> Slicer:
    def sliced(latent: torch.Tensor) -> torch.Tensor:
        return rounding(latent @ z_map if isinstance(z_map, torch.Tensor) else z_map(latent))

    return sliced
