"""The fixed orthogonal matrix that spreads a token's values evenly before they are rounded.

A rounded row has one scale a token and part, so one large column would cost every other column its resolution. After
the rotation every column is a sum of all columns, and its values look Gaussian.
"""

import functools
import math

import torch


@functools.lru_cache(maxsize=64)
def _matrix(size: int) -> torch.Tensor:
    power = size & -size  # the largest power of two that divides the size
    found = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while found.shape[0] < power:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return torch.kron(found / math.sqrt(power), _cosines(size // power)).contiguous()


def _cosines(size: int) -> torch.Tensor:
    """Return the orthonormal discrete cosine transform of an odd size (the identity for 1)."""
    place = torch.arange(size, dtype=torch.float64, device="cpu")
    rows = torch.cos(math.pi / size * (place[None, :] + 0.5) * place[:, None]) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def rotation(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return an orthogonal matrix ``[size, size]`` on the CPU.

    The matrix is Hadamard's for a power of two, and otherwise Hadamard's for the largest power of two that divides the
    size, times (Kronecker) a cosine transform. ``x @ rotation(n)`` rotates row vectors, and its transpose rotates back.

    Raises:
        ValueError: the size is negative.
    """
    if size < 0:
        raise ValueError(f"expected the size of a rotation to be at least 0, got {size}")
    if size == 0:
        return torch.zeros(0, 0, dtype=dtype, device="cpu")
    return _matrix(size).to(dtype, copy=True)
