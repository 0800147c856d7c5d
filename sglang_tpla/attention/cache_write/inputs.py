"""The inputs of a cache write: the new tokens, how they become rows, and the slots of those rows.

    z = RMSNorm(c; weight, eps) Z,    cache[slot] = row of (z, R(position) k_rope),    q_rope <- R(position) q_rope

(docs/design.md, section 2). One `CacheWrite` serves every row format, the Triton kernels and their PyTorch twin.
"""

from dataclasses import dataclass

import torch

from sglang_tpla.attention.interface import AttentionInputError
from sglang_tpla.cache_rows.layer_rows import GroupRows


@dataclass(frozen=True)
class CacheWrite:
    """The rows of some new tokens in one layer's cache.

    Args:
        latent: [tokens, d] before the norm; without ``weight`` the finished columns [tokens, w + g n] of sketched rows.
            Rows may be strided.
        k_rope: [tokens, rope]; rows may be strided.
        slots: [tokens] integer, rows of ``cache``; if two tokens name one slot, either may win.
        cache: [slots, items] or [slots, 1, items], rows may be strided: w + rope values, or the bytes of a sketched
            row.
        weight: [d], the norm's weight; None means that norm and projection have been done (sketched rows only).
        eps: the norm's epsilon.
        z: [d, w] float32, contiguous; None keeps the whole latent (w = d).
        cos_sin: [positions, rope] float32, cosines then sines; None means that ``k_rope`` has been rotated.
        positions: [tokens] integer, rows of ``cos_sin``.
        q_rope: [tokens, heads, rope], the queries' rope part, rotated in place where ``cos_sin`` is given; tokens and
            heads may be strided. None: rotate no queries.
        neox: True if a pair's members lie half a vector apart, False if they are neighbours. Rotation keeps the order.
        sketched: the sketched rows and the group that they belong to: the slice is then
            ``[shared | own | sketch of all groups]``, and ``z`` is [d, w + g n]. None: write plain rows.

    Raises:
        AttentionInputError: a shape or dtype does not fit.
    """

    latent: torch.Tensor
    k_rope: torch.Tensor
    slots: torch.Tensor
    cache: torch.Tensor
    weight: torch.Tensor | None = None
    eps: float = 0.0
    z: torch.Tensor | None = None
    cos_sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    q_rope: torch.Tensor | None = None
    neox: bool = False
    sketched: GroupRows | None = None

    def __post_init__(self) -> None:
        if self.latent.dim() != 2 or self.k_rope.dim() != 2:
            raise AttentionInputError(
                f"latent must be [tokens, d] and k_rope [tokens, rope]; got {list(self.latent.shape)} and "
                f"{list(self.k_rope.shape)}"
            )
        if self.weight is None and (self.z is not None or self.sketched is None):
            raise AttentionInputError("weight must be given: only sketched rows are written from finished slices")
        for name, tensor, dims, dtype in self._expected():
            if tuple(tensor.shape) != dims or tensor.dtype != dtype:
                raise AttentionInputError(
                    f"{name} must be {dtype} {list(dims)} for {self.tokens} tokens; got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            if tensor.stride(-1) != 1:
                raise AttentionInputError(f"{name} must have contiguous rows; got strides {tensor.stride()}")
        for name, table in (("weight", self.weight), ("z", self.z), ("cos_sin", self.cos_sin)):
            if table is not None and not table.is_contiguous():
                raise AttentionInputError(f"{name} must be contiguous; got strides {table.stride()}")
        if self.rope_dim % 2:
            raise AttentionInputError(f"k_rope must hold pairs, an even number of values; got {self.rope_dim}")
        if (self.cos_sin is None) != (self.positions is None):
            raise AttentionInputError("cos_sin and positions come together, or neither where k_rope is rotated")
        for name, index in (("slots", self.slots), ("positions", self.positions)):
            if index is not None and (
                index.shape != (self.tokens,)
                or index.dtype not in (torch.int32, torch.int64)
                or not index.is_contiguous()
            ):
                raise AttentionInputError(
                    f"{name} must be contiguous int32 or int64 [{self.tokens}]; got {index.dtype} {list(index.shape)}"
                )

    def _expected(self) -> list[tuple[str, torch.Tensor, tuple[int, ...], torch.dtype]]:
        """Return each given tensor with its name and its expected shape and dtype."""
        tokens, d, rope, rows, made = self.tokens, self.latent.shape[1], self.rope_dim, self.rows, self.sketched
        columns = self.width if made is None else made.columns
        dtype = self.cache.dtype if made is None else self.latent.dtype
        key_dtype = dtype if self.weight is not None else self.k_rope.dtype
        heads = self.q_rope.shape[1] if self.q_rope is not None and self.q_rope.dim() == 3 else 1
        positions = 0 if self.cos_sin is None else self.cos_sin.shape[0]
        expected = (
            ("latent", self.latent, (tokens, columns if self.z is None else d), dtype),
            ("k_rope", self.k_rope, (tokens, rope), key_dtype),
            ("weight", self.weight, (d,), dtype),
            ("cache", rows, (rows.shape[0], self.row_items), dtype if made is None else torch.uint8),
            ("z", self.z, (d, columns), torch.float32),
            ("q_rope", self.q_rope, (tokens, heads, rope), dtype),
            ("cos_sin", self.cos_sin, (positions, rope), torch.float32),
        )
        return [(name, tensor, dims, dtype) for name, tensor, dims, dtype in expected if tensor is not None]

    @property
    def rows(self) -> torch.Tensor:
        """The cache as [slots, items]."""
        squeezes = self.cache.dim() == 3 and self.cache.shape[1] == 1
        return self.cache.squeeze(1) if squeezes else self.cache

    @property
    def tokens(self) -> int:
        return self.latent.shape[0]

    @property
    def rope_dim(self) -> int:
        return self.k_rope.shape[1]

    @property
    def width(self) -> int:
        """Number of columns of the slice that a row is made of."""
        return (self.latent if self.z is None else self.z).shape[1]

    @property
    def row_items(self) -> int:
        """Number of items that a row of the cache must have."""
        return self.width + self.rope_dim if self.sketched is None else self.sketched.row_items

    @property
    def heads(self) -> int:
        """Number of query heads to rotate."""
        return 0 if self.q_rope is None or self.cos_sin is None else self.q_rope.shape[1]
