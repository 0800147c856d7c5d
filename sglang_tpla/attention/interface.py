"""The interface of decode attention over a paged latent cache.

A cache row is one token's ``[latent | rope]``. The latent part is both key and value, the rope part only key:

    p = softmax(scale * (q_latent z^T + q_rope k_rope^T)),    out = p z        (one group, arXiv 2508.15881)

Names and shapes are the same for every backend:

    q_latent  [batch * query_len, heads, w]     absorbed queries, tokens of one request side by side
    q_rope    [batch * query_len, heads, rope]
    kv_cache  [slots, w + rope]                 slots = pages * page_size (or [slots, 1, w + rope]);
    lengths   [batch] int32                     cached tokens of a request, its query tokens included
    out       [batch * query_len, heads, w]

Sketched rows (`cache_rows.sketched`) are uint8 [slots, row_bytes], and w is ``w_pad``. The sketch of the other groups'
columns takes part in scores alone, so a query has columns for it: q_latent is [.., w_pad + (g - 1) n], with the own
columns first and zeros in the padding.

Query token j of a request sees the first ``length - query_len + 1 + j`` tokens. The output of a query token that sees
nothing is zero: every query token of a request of length 0 (CUDA graphs pad batches with such requests), and the first
ones of a request with 0 < length < query_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sglang_tpla.cache_rows.layer_rows import GroupRows, LayerRows
from sglang_tpla.cache_rows.sketched import SketchedRows
from sglang_tpla.errors import SglangTplaError

MAX_QUERY_LEN = 4


class AttentionInputError(SglangTplaError, ValueError):
    """No backend serves an input right; the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class DecodeShape:
    """The sizes of one attention layer on one rank; they are fixed for the life of a server.

    Args:
        latent_dim: w, latent values of a token on this rank.
        heads: query heads on this rank.
        rope_dim: rotary values of a token.
        query_len: query tokens of a request in one step, 1 to 4; a step of more than 1 verifies speculative tokens.
        page_size: tokens of a page, a power of two.
        dtype: the dtype of queries and output, and of a plain cache.
        sketched: the sizes of sketched rows; None if the cache holds plain rows.

    Raises:
        AttentionInputError: a value is outside these ranges.
    """

    latent_dim: int
    heads: int
    rope_dim: int = 64
    query_len: int = 1
    page_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    sketched: SketchedRows | None = None

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
        rows = self.sketched
        if rows is not None and (self.latent_dim, self.rope_dim) != (rows.w_pad, rows.rope_dim):
            raise AttentionInputError(
                f"DecodeShape of sketched rows must have latent_dim {rows.w_pad} (w_pad) and rope_dim {rows.rope_dim}; "
                f"got {self.latent_dim} and {self.rope_dim}; use DecodeShape.of_sketched"
            )

    @classmethod
    def of_sketched(
        cls, rows: SketchedRows, heads: int, query_len: int = 1, page_size: int = 1, dtype: torch.dtype = torch.bfloat16
    ) -> DecodeShape:
        """Return the shape of a layer whose cache holds ``rows``."""
        return cls(rows.w_pad, heads, rows.rope_dim, query_len, page_size, dtype, sketched=rows)

    @classmethod
    def of_rows(cls, rows: LayerRows, heads: int, **others: Any) -> DecodeShape:
        """Return the shape of a layer that caches such rows; ``others`` are the remaining fields."""
        if isinstance(rows, GroupRows):
            return cls.of_sketched(rows.rows, heads, **others)
        return cls(rows.width, heads, rows.rope_dim, **others)

    @property
    def kind(self) -> str:
        """The kind of rows that the cache holds: "plain" or "sketched"."""
        return "plain" if self.sketched is None else "sketched"

    @property
    def query_dim(self) -> int:
        """Columns of q_latent: w, plus those of the sketch."""
        return self.latent_dim if self.sketched is None else self.sketched.score_columns

    @property
    def cache_dim(self) -> int:
        """Items of one cache row: w + rope values, or the bytes of a sketched row."""
        return self.latent_dim + self.rope_dim if self.sketched is None else self.sketched.row_bytes

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.dtype if self.kind == "plain" else torch.uint8


@dataclass(frozen=True)
class PageTable:
    """The places of each request's tokens in the cache.

    Token i of request b is slot ``indices[starts[b] + i // page_size] * page_size + i % page_size``.

    Args:
        indices: [any] int32, page numbers.
        starts: [batch] int32, each request's first entry in ``indices``.
        page_size: tokens of a page.
    """

    indices: torch.Tensor
    starts: torch.Tensor
    page_size: int = 1

    def __post_init__(self) -> None:
        for name, tensor in (("indices", self.indices), ("starts", self.starts)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise AttentionInputError(
                    f"PageTable.{name} must be a contiguous int32 vector; got {tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def batch(self) -> int:
        return self.starts.shape[0]

    @classmethod
    def from_csr(cls, indptr: torch.Tensor, indices: torch.Tensor, page_size: int = 1) -> PageTable:
        """Return the table in FlashInfer's form: request b has ``indices[indptr[b]:indptr[b + 1]]``. Nothing is copied.

        Args:
            indptr: [batch + 1] int32.
            indices: [indptr[-1] or more] int32.
        """
        return cls(indices=indices, starts=indptr[:-1], page_size=page_size)

    @classmethod
    def from_req_to_token(cls, req_to_token: torch.Tensor, rows: torch.Tensor) -> PageTable:
        """Return the table in SGLang's form: row ``rows[b]`` of ``req_to_token`` has request b's slots, a slot a token.

        Args:
            req_to_token: [requests, max_context] int32, contiguous.
            rows: [batch] integer.

        Raises:
            AttentionInputError: the table's positions do not fit in 32 bits.
        """
        if req_to_token.numel() >= 2**31:
            raise AttentionInputError(
                f"req_to_token must have fewer than 2**31 entries; got {list(req_to_token.shape)}; build a "
                "CSR table of the running requests instead (PageTable.from_csr)"
            )
        starts = (rows.to(torch.int64) * req_to_token.shape[1]).to(torch.int32)
        return cls(indices=req_to_token.reshape(-1), starts=starts)


class DecodeAttention(Protocol):
    """A backend made for one ``DecodeShape``: call ``plan`` once a step and ``run`` once a layer."""

    shape: DecodeShape

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        """Lay out the work of a step. Backends for CUDA graphs keep the tensors' addresses: refill the tensors.

        From this call to the step's last ``run``, lengths, page table and the rows of earlier tokens must not change,
        because a kernel may read them while its predecessor in the stream still runs. Rows of the step's own
        tokens (the last ``query_len`` of a request) may be written until the ``run`` that reads them.
        """

    def run(
        self, q_latent: torch.Tensor, q_rope: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend, and return ``out`` [batch * query_len, heads, latent_dim], which is a new tensor if None is given."""


def checked_inputs(
    shape: DecodeShape, table: PageTable, q_latent: torch.Tensor, q_rope: torch.Tensor, kv_cache: torch.Tensor
) -> torch.Tensor:
    """Check the inputs that every backend needs, and return the cache as [slots, items].

    Raises:
        AttentionInputError: a shape or dtype does not fit ``shape`` and ``table``.
    """
    cache = kv_cache.squeeze(1) if kv_cache.dim() == 3 and kv_cache.shape[1] == 1 else kv_cache
    tokens = table.batch * shape.query_len
    expected = (
        ("q_latent", q_latent, (tokens, shape.heads, shape.query_dim), shape.dtype),
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
