"""The interface of decode attention over a paged latent cache.

A cache row is one token's ``[latent | rope]``. The latent part is both key and value, the rope part only key:

    p = softmax(scale * (q_latent z^T + q_rope k_rope^T)),    out = p z        (one group, arXiv 2508.15881)

Names and shapes, the same for every backend:

    q_latent  [batch * query_len, heads, w]     absorbed queries, tokens of one request side by side
    q_rope    [batch * query_len, heads, rope]
    kv_cache  [slots, w + rope]                 slots = pages * page_size (or [slots, 1, w + rope]);
                                                or FP8 rows, uint8 [slots, row_bytes] (`fp8_rows`)
    lengths   [batch] int32                     cached tokens a request has, the query tokens included
    out       [batch * query_len, heads, w]

Query token j of a request sees the first ``length - query_len + 1 + j`` tokens. A request of length 0 gets
zeros: CUDA graphs pad batches with such requests. A request with 0 < length < query_len has query tokens
that see nothing; they get zeros too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_tpla.cache_rows import fp8 as fp8_rows
from sglang_tpla.errors import SglangTplaError

MAX_QUERY_LEN = 4


class AttentionInputError(SglangTplaError, ValueError):
    """An input that no backend could serve right: what was expected, what came, where, what to do."""


@dataclass(frozen=True)
class DecodeShape:
    """What one attention layer of one rank looks like; fixed for the life of a server.

    Args:
        latent_dim: w, latent values a token holds on this rank.
        heads: query heads on this rank.
        rope_dim: rotary values a token holds.
        query_len: query tokens a request has in one step, 1 to 4 (above 1: speculative verification).
        page_size: tokens a page, a power of two.
        dtype: of queries, output and, but for FP8 rows, the cache.
        fp8_shared: r, columns with the first of an FP8 row's two scales; None where the cache holds plain rows.

    Raises:
        AttentionInputError: a value outside of these ranges.
    """

    latent_dim: int
    heads: int
    rope_dim: int = 64
    query_len: int = 1
    page_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    fp8_shared: int | None = None

    def __post_init__(self) -> None:
        for name in ("latent_dim", "heads", "rope_dim", "query_len", "page_size"):
            if getattr(self, name) < 1:
                raise AttentionInputError(f"DecodeShape.{name} must be at least 1; got {getattr(self, name)}")
        if self.query_len > MAX_QUERY_LEN:
            raise AttentionInputError(
                f"DecodeShape.query_len must be at most {MAX_QUERY_LEN}; got {self.query_len}; "
                "verify fewer speculative tokens in a step"
            )
        if self.page_size & (self.page_size - 1):
            raise AttentionInputError(f"DecodeShape.page_size must be a power of two; got {self.page_size}")
        if self.fp8_shared is None:
            return
        if not 0 <= self.fp8_shared <= self.latent_dim:
            raise AttentionInputError(
                f"DecodeShape.fp8_shared must lie in 0...{self.latent_dim}; got {self.fp8_shared}"
            )
        if (why := fp8_rows.objection(self.latent_dim, self.rope_dim)) is not None:
            raise AttentionInputError(f"{why}; use --kv-cache-dtype auto, or an artifact of other widths")

    @property
    def cache_dim(self) -> int:
        """Items of one cache row: w + rope values, or an FP8 row's bytes."""
        if self.fp8_shared is not None:
            return fp8_rows.row_bytes(self.latent_dim, self.rope_dim)
        return self.latent_dim + self.rope_dim

    @property
    def cache_dtype(self) -> torch.dtype:
        """Type of those items."""
        return self.dtype if self.fp8_shared is None else torch.uint8


@dataclass(frozen=True)
class PageTable:
    """Where the tokens of each request lie.

    Token i of request b is slot ``indices[starts[b] + i // page_size] * page_size + i % page_size``.

    Args:
        indices: [any] int32, page numbers.
        starts: [batch] int32, each request's first entry in ``indices``.
        page_size: tokens a page.
    """

    indices: torch.Tensor
    starts: torch.Tensor
    page_size: int = 1

    def __post_init__(self) -> None:
        for name, tensor in (("indices", self.indices), ("starts", self.starts)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise AttentionInputError(
                    f"PageTable.{name} must be a contiguous int32 vector; "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def batch(self) -> int:
        """Requests in the table."""
        return self.starts.shape[0]

    @classmethod
    def from_csr(cls, indptr: torch.Tensor, indices: torch.Tensor, page_size: int = 1) -> PageTable:
        """FlashInfer's form: request b has ``indices[indptr[b]:indptr[b + 1]]``. Nothing is copied.

        Args:
            indptr: [batch + 1] int32.
            indices: [indptr[-1] or more] int32.
        """
        return cls(indices=indices, starts=indptr[:-1], page_size=page_size)

    @classmethod
    def from_req_to_token(cls, req_to_token: torch.Tensor, rows: torch.Tensor) -> PageTable:
        """SGLang's form: request b's token slots are row ``rows[b]`` of ``req_to_token``, whatever the page
        size.

        Args:
            req_to_token: [requests, max_context] int32, contiguous.
            rows: [batch] integer.

        Raises:
            AttentionInputError: a table whose positions do not fit in 32 bits.
        """
        if req_to_token.numel() >= 2**31:
            raise AttentionInputError(
                f"req_to_token must have fewer than 2**31 entries; got {list(req_to_token.shape)}; build a "
                "CSR table of the running requests instead (PageTable.from_csr)"
            )
        starts = (rows.to(torch.int64) * req_to_token.shape[1]).to(torch.int32)
        return cls(indices=req_to_token.reshape(-1), starts=starts)


class DecodeAttention(Protocol):
    """A backend made for one ``DecodeShape``; ``plan`` once a step, ``run`` once a layer."""

    shape: DecodeShape

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        """Lay out the work of a step. Backends for CUDA graphs keep these tensors' addresses: refill, do not
        replace.

        From here to the step's last ``run``, lengths, page table and the rows of earlier tokens stay as they
        are: a kernel may read them while the one before it in the stream still runs. Rows of the step's own
        tokens (the last ``query_len`` of a request) may be written until the ``run`` that reads them.
        """

    def run(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; returns ``out`` [batch * query_len, heads, w], newly made when None is given."""


def checked_inputs(
    shape: DecodeShape, table: PageTable, q_latent: torch.Tensor, q_rope: torch.Tensor, kv_cache: torch.Tensor
) -> torch.Tensor:
    """Check what every backend needs, and return the cache as [slots, items].

    Raises:
        AttentionInputError: a shape or dtype that does not fit ``shape`` and ``table``.
    """
    cache = kv_cache.squeeze(1) if kv_cache.dim() == 3 and kv_cache.shape[1] == 1 else kv_cache
    tokens = table.batch * shape.query_len
    expected = (
        ("q_latent", q_latent, (tokens, shape.heads, shape.latent_dim), shape.dtype),
        ("q_rope", q_rope, (tokens, shape.heads, shape.rope_dim), shape.dtype),
        ("kv_cache", cache, (cache.shape[0], shape.cache_dim), shape.cache_dtype),
    )
    for name, tensor, dims, dtype in expected:
        if tuple(tensor.shape) != dims or tensor.dtype != dtype:
            raise AttentionInputError(
                f"{name} must be {dtype} {list(dims)} for {table.batch} requests; "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    if table.page_size != shape.page_size:
        raise AttentionInputError(
            f"the page table has page_size {table.page_size}, the backend was made for {shape.page_size}"
        )
    return cache


def checked_write(
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    cache: torch.Tensor,
    q_rope: torch.Tensor | None,
    fp8: bool = False,
) -> torch.Tensor:
    """Check the inputs of ``write_latent`` (`latent_write`, or with ``fp8`` `fp8_write`), and return the cache as
    [slots, items].

    Raises:
        AttentionInputError: what was expected, and what came.
    """
    rows = cache.squeeze(1) if cache.dim() == 3 and cache.shape[1] == 1 else cache
    if latent.dim() != 2 or k_rope.dim() != 2:
        raise AttentionInputError(
            f"latent must be [tokens, d] and k_rope [tokens, rope]; got {list(latent.shape)} and "
            f"{list(k_rope.shape)}"
        )
    (tokens, d), rope = latent.shape, k_rope.shape[1]
    w = d if z is None else z.shape[-1]
    dtype = latent.dtype if fp8 else cache.dtype
    items, kind = (fp8_rows.row_bytes(w, rope), torch.uint8) if fp8 else (w + rope, dtype)
    expected = [
        ("latent", latent, (tokens, d), dtype),
        ("k_rope", k_rope, (tokens, rope), dtype),
        ("weight", weight, (d,), dtype),
        ("cache", rows, (rows.shape[0], items), kind),
    ]
    if z is not None:
        expected.append(("z", z, (d, w), torch.float32))
    if q_rope is not None:
        heads = q_rope.shape[1] if q_rope.dim() == 3 else 1
        expected.append(("q_rope", q_rope, (tokens, heads, rope), dtype))
    if cos_sin is not None:
        expected.append(("cos_sin", cos_sin, (cos_sin.shape[0], rope), torch.float32))
    for name, tensor, dims, kind in expected:
        if tuple(tensor.shape) != dims or tensor.dtype != kind:
            raise AttentionInputError(
                f"{name} must be {kind} {list(dims)} for {tokens} tokens; got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.stride(-1) != 1:
            raise AttentionInputError(f"{name} must have contiguous rows; got strides {tensor.stride()}")
    for name, table in (("weight", weight), ("z", z), ("cos_sin", cos_sin)):
        if table is not None and not table.is_contiguous():
            raise AttentionInputError(f"{name} must be contiguous; got strides {table.stride()}")
    if rope % 2:
        raise AttentionInputError(f"k_rope must hold pairs, an even number of values; got {rope}")
    if (cos_sin is None) != (positions is None):
        raise AttentionInputError("cos_sin and positions come together, or neither where k_rope is rotated")
    for name, index in (("slots", slots), ("positions", positions)):
        if index is not None and (
            index.shape != (tokens,)
            or index.dtype not in (torch.int32, torch.int64)
            or not index.is_contiguous()
        ):
            raise AttentionInputError(
                f"{name} must be contiguous int32 or int64 [{tokens}]; got {index.dtype} {list(index.shape)}"
            )
    return rows


def checked_fp8_rows(
    z: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor
) -> torch.Tensor:
    """Check the inputs of ``write_rows`` (`fp8_write`), and return the cache as [slots, row_bytes].

    Raises:
        AttentionInputError: what was expected, and what came.
    """
    rows = cache.squeeze(1) if cache.dim() == 3 and cache.shape[1] == 1 else cache
    fits = z.dim() == k_rope.dim() == 2 and z.stride(-1) == k_rope.stride(-1) == 1 and len(z) == len(k_rope)
    if not fits or slots.shape != (len(z),) or not slots.is_contiguous():
        raise AttentionInputError(
            "z must be [tokens, w], k_rope [tokens, rope] and slots [tokens], with contiguous rows; got "
            f"{list(z.shape)}, {list(k_rope.shape)} and {list(slots.shape)}"
        )
    size = fp8_rows.row_bytes(z.shape[1], k_rope.shape[1])
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != size or rows.stride(-1) != 1:
        raise AttentionInputError(
            f"cache must be torch.uint8 [slots, {size}]; got {rows.dtype} {list(rows.shape)}"
        )
    return rows
