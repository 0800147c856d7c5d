"""FlashInfer's paged MLA decode (``flashinfer.mla.BatchMLAPagedAttentionWrapper``) behind the attention interface.

FlashInfer's templates take the latent width as a parameter, but compute right only at some widths (``backends.py``).
Planning runs on the host and reads the lengths back, so capture ``run`` in a CUDA graph and plan outside the graph.
"""

from typing import Any

import torch

from sglang_tpla.attention.backends import require
from sglang_tpla.attention.interface import AttentionInputError, DecodeShape, PageTable, checked_inputs

WORKSPACE_BYTES = 128 << 20


class FlashInferDecode:
    """FlashInfer for one shape.

    Args:
        shape: the shape to serve.
        scale: softmax scale.
        device: a CUDA device.
        template: ``fa3`` (Hopper, width 512) or ``fa2``.

    Raises:
        BackendRefusal: the template computes this width wrong.
    """

    def __init__(self, shape: DecodeShape, scale: float, device: torch.device, template: str) -> None:
        require(f"flashinfer_{template}", shape, torch.cuda.get_device_capability(device))
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        self.shape = shape
        self.scale = scale
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.int8, device=device)
        self._wrapper: Any = BatchMLAPagedAttentionWrapper(workspace, backend=template)
        self._table: PageTable | None = None

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        """Plan a step. The table must be CSR without gaps between requests (``PageTable.from_csr``).

        Raises:
            AttentionInputError: the table's starts do not follow from the lengths.
        """
        pages = (lengths.long() + table.page_size - 1) // table.page_size
        indptr = torch.cat([table.starts.long(), table.starts[-1:].long() + pages[-1:]]).to(torch.int32)
        if not torch.equal(indptr[1:] - indptr[:-1], pages.to(torch.int32)):
            raise AttentionInputError(
                "FlashInfer needs a CSR page table without gaps: entry b + 1 of starts must be entry b plus "
                "the request's pages; build it with PageTable.from_csr"
            )
        query_indptr = torch.arange(table.batch + 1, dtype=torch.int32, device=indptr.device) * self.shape.query_len
        self._wrapper.plan(
            query_indptr,
            indptr,
            table.indices,
            lengths,
            self.shape.heads,
            self.shape.latent_dim,
            self.shape.rope_dim,
            table.page_size,
            self.shape.query_len > 1,
            self.scale,
            self.shape.dtype,
            self.shape.dtype,
        )
        self._table = table

    def run(
        self, q_latent: torch.Tensor, q_rope: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend over the planned step; see ``interface.py``."""
        if self._table is None:
            raise RuntimeError("FlashInferDecode.run came before plan: plan the step first")
        cache = checked_inputs(self.shape, self._table, q_latent, q_rope, kv_cache)
        pages = cache.view(-1, self.shape.page_size, self.shape.cache_dim)
        latent, rope = pages.split([self.shape.latent_dim, self.shape.rope_dim], dim=-1)
        return self._wrapper.run(q_latent, q_rope, latent, rope, out=out)
