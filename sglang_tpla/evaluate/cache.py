"""Slices as a cache of another precision hands them back, to measure what that precision costs.

The rotary key is left alone: every format keeps it in bfloat16, and its rounding is plain MLA's too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang_tpla.attention.fp8_rows import rounded
from sglang_tpla.models.plain import LayerMaps, Slicer

CACHE_DTYPES = ("exact", "bf16", "fp8")


def _bf16(z: torch.Tensor) -> torch.Tensor:
    return z.to(torch.bfloat16).to(z.dtype)


def cached_maps(maps: Sequence[LayerMaps], cache_dtype: str) -> list[LayerMaps]:
    """Maps whose slices go through a cache: ``exact`` changes nothing, ``bf16`` and ``fp8`` (`fp8_rows`) round.

    Raises:
        ValueError: another name.
    """
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"expected a cache dtype among {CACHE_DTYPES}, got {cache_dtype!r}")
    if cache_dtype == "exact":
        return list(maps)
    rounding = rounded if cache_dtype == "fp8" else _bf16
    return [[(_through(z, rounding), a, b) for z, a, b in layer] for layer in maps]


def _through(z_map: Slicer, rounding: Callable[[torch.Tensor], torch.Tensor]) -> Slicer:
    def sliced(latent: torch.Tensor) -> torch.Tensor:
        return rounding(latent @ z_map if isinstance(z_map, torch.Tensor) else z_map(latent))

    return sliced
