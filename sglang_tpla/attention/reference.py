"""Paged latent decode attention in plain PyTorch: the twin of the kernels.

The twin runs on any device and at any width, and computes in float32 (float64 for float64 inputs), one request at a
time. ``interface.py`` has the names, the shapes and the equation.
"""

import torch

from sglang_tpla.attention.interface import DecodeShape, PageTable, checked_inputs
from sglang_tpla.cache_rows import sketched


def token_slots(table: PageTable, request: int, length: int) -> torch.Tensor:
    """Return the cache slots of a request's first ``length`` tokens, [length] int64."""
    token = torch.arange(length, device=table.indices.device)
    page = table.indices[table.starts[request].long() + token // table.page_size].long()
    return page * table.page_size + token % table.page_size


def latent_attention(
    shape: DecodeShape,
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    table: PageTable,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend over the paged cache; see ``interface.py`` for names and shapes.

    Returns:
        The output in float32 (float64 for float64 queries), not rounded to the inputs' dtype.
    """
    compute = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    out = torch.zeros(*q_latent.shape[:-1], shape.latent_dim, dtype=compute, device=q_latent.device)
    query = torch.cat([q_latent, q_rope], dim=-1).to(compute)  # [tokens, heads, w + rope]
    for request, length in enumerate(lengths.tolist()):
        rows = kv_cache[token_slots(table, request, length)]
        if shape.sketched is not None:
            unpacked = sketched.unpack_rows(shape.sketched, rows)
            rows = torch.cat([unpacked.latent, unpacked.sketch, unpacked.k_rope], dim=-1)
        keys = rows.to(compute)  # [length, w + rope]
        for j in range(shape.query_len):
            seen = length - shape.query_len + 1 + j
            if seen <= 0:
                continue
            token = request * shape.query_len + j
            score = scale * (query[token] @ keys[:seen].T)  # [heads, seen]
            out[token] = torch.softmax(score, dim=-1) @ keys[:seen, : shape.latent_dim]
    return out


class ReferenceDecode:
    """``latent_attention`` behind the ``DecodeAttention`` interface, for rows of every format."""

    def __init__(self, shape: DecodeShape, scale: float) -> None:
        self.shape = shape
        self.scale = scale
        self._table: PageTable | None = None
        self._lengths: torch.Tensor | None = None

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        self._table, self._lengths = table, lengths

    def run(
        self, q_latent: torch.Tensor, q_rope: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend, and return ``out`` in the queries' dtype."""
        if self._table is None or self._lengths is None:
            raise RuntimeError("ReferenceDecode.run came before plan: plan the step first")
        cache = checked_inputs(self.shape, self._table, q_latent, q_rope, kv_cache)
        result = latent_attention(self.shape, q_latent, q_rope, cache, self._table, self._lengths, self.scale)
        result = result.to(q_latent.dtype)
        return result if out is None else out.copy_(result)
