"""Paged latent decode attention in plain PyTorch: the twin of the kernels.

It takes any device and any width, and computes in float32 (float64 for float64 inputs), one request at a time.
``interface.py`` has the names, the shapes and the equation.
"""

from collections.abc import Callable

import torch

from sglang_tpla.attention.interface import DecodeShape, PageTable, checked_inputs
from sglang_tpla.cache_rows import sketched


def token_slots(table: PageTable, request: int, length: int) -> torch.Tensor:
    """Return the cache slots of a request's first ``length`` tokens, [length] int64."""
    token = torch.arange(length, device=table.indices.device)
    page = table.indices[table.starts[request].long() + token // table.page_size].long()
    return page * table.page_size + token % table.page_size


def latent_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    table: PageTable,
    lengths: torch.Tensor,
    *,
    scale: float,
    query_len: int = 1,
    read: Callable[[torch.Tensor], torch.Tensor] | None = None,
    value_dim: int | None = None,
) -> torch.Tensor:
    """Attend over the paged cache; see ``interface.py`` for names and shapes.

    Args:
        read: decodes rows of the cache [rows, items] to [rows, columns of q_latent + rope]; None for plain rows.
        value_dim: number of leading columns that are values too; None: all of q_latent's.

    Returns:
        out [batch * query_len, heads, value_dim] in float32 (float64 for float64 queries), not rounded to the
        inputs' dtype.
    """
    compute = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    latent_dim = q_latent.shape[-1] if value_dim is None else value_dim
    out = torch.zeros(*q_latent.shape[:-1], latent_dim, dtype=compute, device=q_latent.device)
    query = torch.cat([q_latent, q_rope], dim=-1).to(compute)  # [tokens, heads, w + rope]
    for request, length in enumerate(lengths.tolist()):
        rows = kv_cache[token_slots(table, request, length)]
        keys = (rows if read is None else read(rows)).to(compute)  # [length, w + rope]
        for j in range(query_len):
            seen = length - query_len + 1 + j
            if seen <= 0:
                continue
            token = request * query_len + j
            score = scale * (query[token] @ keys[:seen].T)  # [heads, seen]
            out[token] = torch.softmax(score, dim=-1) @ keys[:seen, :latent_dim]
    return out


def reader_of(shape: DecodeShape) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the ``read`` of ``latent_attention`` for the cache of ``shape``."""
    rows = shape.sketched
    if rows is None:
        return None

    def read(packed: torch.Tensor) -> torch.Tensor:
        unpacked = sketched.unpack_rows(rows, packed)
        return torch.cat([unpacked.latent, unpacked.sketch, unpacked.k_rope], dim=-1)

    return read


class ReferenceDecode:
    """``latent_attention`` behind the ``DecodeAttention`` interface, for rows of every format."""

    def __init__(self, shape: DecodeShape, scale: float) -> None:
        self.shape = shape
        self.scale = scale
        self._table: PageTable | None = None
        self._lengths: torch.Tensor | None = None

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        """Remember the step's table and lengths."""
        self._table, self._lengths = table, lengths

    def run(
        self, q_latent: torch.Tensor, q_rope: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend, and return ``out`` in the queries' dtype."""
        if self._table is None or self._lengths is None:
            raise RuntimeError("ReferenceDecode.run came before plan: plan the step first")
        cache = checked_inputs(self.shape, self._table, q_latent, q_rope, kv_cache)
        result = latent_attention(
            q_latent,
            q_rope,
            cache,
            self._table,
            self._lengths,
            scale=self.scale,
            query_len=self.shape.query_len,
            read=reader_of(self.shape),
            value_dim=self.shape.latent_dim,
        ).to(q_latent.dtype)
        return result if out is None else out.copy_(result)
