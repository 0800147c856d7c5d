"""Random inputs of a cache write, for CPU and GPU tests: strided rows, slots in random order, a poisoned cache."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from sglang_tpla.attention.cache_write.inputs import CacheWrite
from sglang_tpla.cache_rows.fp8 import row_bytes, slice_width


@dataclass(frozen=True)
class WriteCase:
    """The inputs of a cache write; the cache holds NaN wherever no row is written."""

    latent: torch.Tensor
    k_rope: torch.Tensor
    weight: torch.Tensor
    z: torch.Tensor | None
    cos_sin: torch.Tensor | None
    positions: torch.Tensor | None
    slots: torch.Tensor
    cache: torch.Tensor
    q_rope: torch.Tensor | None

    def write(self, eps: float, rotate: str | None = None, **changes: Any) -> CacheWrite:
        """The input of the kernels and their twin; ``rotate`` is "halves", "pairs" or None."""
        inputs = {field.name: getattr(self, field.name) for field in fields(self)}
        return CacheWrite(**(inputs | {"eps": eps, "neox": rotate == "halves"} | changes))


def random_write(
    tokens: int,
    d: int,
    w: int | None,
    rope: int,
    rotated: bool,
    dtype: torch.dtype,
    seed: int,
    device: str = "cpu",
    heads: int = 0,
) -> WriteCase:
    """Make a random case; 0 heads make no queries.

    ``latent`` and ``k_rope`` are columns of one matrix, as the joint down-projection leaves them. The queries' rope
    part is the last columns of each head.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    joint = normal(tokens, d + rope + 8).to(dtype)
    queries = normal(tokens, heads, 12 + rope).to(dtype)
    angles = normal(50, rope // 2)
    width = (d if w is None else w) + rope
    return WriteCase(
        latent=joint[:, 8 : 8 + d],
        k_rope=joint[:, 8 + d :],
        weight=(1 + 0.1 * normal(d)).to(dtype),
        z=None if w is None else normal(d, w) / d**0.5,
        cos_sin=torch.cat([angles.cos(), angles.sin()], 1) if rotated else None,
        positions=torch.randint(0, 50, (tokens,), generator=g, device=device) if rotated else None,
        slots=torch.randperm(tokens + 20, generator=g, device=device)[:tokens],
        cache=torch.full((tokens + 20, 1, width), float("nan"), dtype=dtype, device=device),
        q_rope=queries[..., 12:] if heads else None,
    )


def fp8_write_case(
    tokens: int,
    d: int,
    w: int | None,
    rope: int,
    rotated: bool,
    dtype: torch.dtype,
    seed: int,
    device: str = "cpu",
    heads: int = 3,
) -> WriteCase:
    """`random_write` into FP8 rows of bytes 255."""
    case = random_write(tokens, d, w, rope, rotated, dtype, seed, device, heads)
    size = row_bytes(d if w is None else w, rope)
    cache = torch.full((len(case.cache), 1, size), 255, dtype=torch.uint8, device=device)
    return replace(case, cache=cache)


def same_rows(case: WriteCase, twin: WriteCase, rope: int, interpreted: bool = False) -> str | None:
    """Say how two writes of the same inputs differ beyond float32's rounding, or return None.

    A few values that lie between two e4m3 numbers may fall on either, and no further.

    Args:
        interpreted: whether Triton's interpreter wrote the rows. It forgets to carry into the exponent where it rounds
            to e4m3, and rounds subnormals its own way, so values an octave apart pass.
    """
    w = slice_width(case.cache.shape[-1], rope)
    mine, other = case.cache.squeeze(1), twin.cache.squeeze(1)
    scales, others = (rows[:, w + 2 * rope :].contiguous().view(torch.float32) for rows in (mine, other))
    if not torch.allclose(scales, others, rtol=1e-5, equal_nan=True):
        return f"scales or the row's end: {scales} and {others}"
    keys, turned = (rows[:, w : w + 2 * rope].contiguous().view(torch.bfloat16).float() for rows in (mine, other))
    if not torch.allclose(keys, turned, rtol=2**-7, atol=2**-7, equal_nan=True):
        return f"keys: {keys} and {turned}"
    queries = [torch.empty(0) if one.q_rope is None else one.q_rope.float() for one in (case, twin)]
    if not torch.allclose(*queries, rtol=2**-7, atol=2**-7):
        return "queries"
    apart = (mine[:, :w].int() - other[:, :w].int()).abs()
    octave = (apart == 8) & torch.tensor(interpreted, device=apart.device)
    if apart[~octave].max() > 1 or apart.bool().float().mean() > (0.1 if interpreted else 0.01):
        return f"values: {int(apart.bool().sum())} of {apart.numel()} bytes differ, by up to {int(apart.max())}"
    return None
