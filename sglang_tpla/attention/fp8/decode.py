"""Decode attention over a paged cache of FP8 rows (`fp8_rows`) behind the attention interface, in Triton.

Serves w any multiple of 32 from 64 to 512, up to 128 heads, query length 1 to 4, any page size that is a power of two,
bfloat16 queries. The cache is split over its length and merged in a fixed order: results repeat to the last bit.
``plan`` only remembers the step's tensors: the programs work out their stretch from lengths on the device, and a CUDA
graph of ``run`` stays right when lengths, page table and queries are refilled in place. Twin:
`reference.ReferenceDecode`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_tpla.attention.interface import AttentionInputError, DecodeShape, PageTable, checked_inputs
from sglang_tpla.cache_rows import fp8 as fp8_rows

MAX_SPLITS = 128  # of one request
SMALLEST_BLOCK = 16  # columns of a block that a matrix product takes


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut; results differ between tilings in rounding alone.

    Args:
        rows: query rows (tokens x heads) of a program. tokens: cache rows of a step of its loop.
        warps, stages: as Triton counts them. programs: how many share a step's tokens, a multiprocessor.
        compute: type that values, queries and probabilities are multiplied in.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    programs: int = 2
    compute: str = "float16"


def tiling_for(shape: DecodeShape) -> Tiling:
    """The tiling that serves ``shape`` best, as far as it was measured."""
    rows = shape.heads * shape.query_len
    if rows <= 32 or shape.latent_dim > 256:
        return Tiling(16 if rows <= 16 else 32, 64, 4, 3)
    if shape.latent_dim > 192:
        return Tiling(64, 32, 4, 4)
    return Tiling(64, 64, 4, 3)


def column_blocks(shared: int, w: int) -> tuple[int, int, int, int]:
    """Widths of the blocks that columns are loaded in: two of the shared, two of the own columns; 0: none.

    The first block of a part is the largest power of two in it, the second what is left.
    """

    def blocks(count: int) -> tuple[int, int]:
        first = 1 << count.bit_length() >> 1
        # a rest narrower than a matrix product is loaded with the first block, masked
        return (count, 0) if count - first < SMALLEST_BLOCK else (first, count - first)

    return (*blocks(shared), *blocks(w - shared))


def _padded(width: int) -> int:
    return max(SMALLEST_BLOCK, 1 << (width - 1).bit_length()) if width else 0


class Fp8Decode:
    """The kernel for one shape, with its buffers.

    Args:
        shape: what to serve, with ``fp8_shared``.
        scale: softmax scale.
        max_batch: most requests a step has.
        device: a GPU.
        tiling: other than ``tiling_for(shape)``, for measuring.

    Raises:
        AttentionInputError: a shape the kernel does not serve.
    """

    def __init__(
        self,
        shape: DecodeShape,
        scale: float,
        max_batch: int,
        device: torch.device,
        tiling: Tiling | None = None,
    ) -> None:
        self.shape, self.scale, self.max_batch = shape, scale, max_batch
        self.device = torch.device(device)
        self.tiling = tiling or tiling_for(shape)
        if self.device.type == "cuda":
            from sglang_tpla.attention.backends import require

            require("fp8_triton", shape, torch.cuda.get_device_capability(device))
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        else:  # Triton's interpreter
            processors = 4
        self._rows = shape.heads * shape.query_len
        self._row_blocks = -(-self._rows // self.tiling.rows)
        self._target = processors * self.tiling.programs
        most = max(batch * self._splits(batch) for batch in range(1, max_batch + 1))
        self._partial_out = torch.empty(
            most * self._rows * shape.latent_dim, dtype=torch.float32, device=device
        )
        self._partial_lse = torch.empty(most * self._rows, dtype=torch.float32, device=device)
        self._table: PageTable | None = None
        self._lengths: torch.Tensor | None = None

    def _splits(self, batch: int) -> int:
        """Most stretches of a request: four times an even share, for requests longer than the others."""
        return max(1, min(MAX_SPLITS, 4 * self._target // (batch * self._row_blocks)))

    def plan(self, table: PageTable, lengths: torch.Tensor) -> None:
        """Remember the step's table and lengths.

        Raises:
            AttentionInputError: lengths that are not contiguous int32 [batch], or more requests than ``max_batch``.
        """
        if lengths.dtype != torch.int32 or lengths.shape != table.starts.shape or not lengths.is_contiguous():
            raise AttentionInputError(
                f"lengths must be contiguous int32 [{table.batch}]; got {lengths.dtype} {list(lengths.shape)}"
            )
        if table.batch > self.max_batch:
            raise AttentionInputError(f"at most {self.max_batch} requests were announced; got {table.batch}")
        self._table, self._lengths = table, lengths

    def run(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over the planned step; see ``interface.py``.

        Raises:
            AttentionInputError: inputs that do not fit the shape, or rows that are not contiguous.
        """
        import triton

        from sglang_tpla.attention.fp8 import decode_triton as kernels

        table, lengths, shape, tiling = self._table, self._lengths, self.shape, self.tiling
        if table is None or lengths is None:
            raise RuntimeError("Fp8Decode.run came before plan: plan the step first")
        cache = checked_inputs(shape, table, q_latent, q_rope, kv_cache)
        if not cache.is_contiguous() or cache.data_ptr() % fp8_rows.ALIGNMENT:
            raise AttentionInputError(
                f"an FP8 cache must be contiguous and start at a 16-byte border; got strides {cache.stride()}"
            )
        for name, tensor in (("q_latent", q_latent), ("q_rope", q_rope)):
            if tensor.stride(-1) != 1:
                raise AttentionInputError(f"{name} must have contiguous rows; got strides {tensor.stride()}")
        if out is None:
            out = torch.empty(q_latent.shape, dtype=shape.dtype, device=q_latent.device)
        batch = table.batch
        if batch == 0:
            return out
        assert shape.fp8_shared is not None
        w, splits = shape.latent_dim, self._splits(batch)
        s0, s1, o0, o1 = column_blocks(shape.fp8_shared, w)
        kernels.fp8_decode_kernel[(self._row_blocks, splits, batch)](
            q_latent,
            q_rope,
            cache,
            cache.view(torch.bfloat16),
            cache.view(torch.float32),
            table.indices,
            table.starts,
            lengths,
            self._partial_out,
            self._partial_lse,
            *q_latent.stride()[:2],
            *q_rope.stride()[:2],
            batch,
            splits,
            self._target,
            self.scale * 1.4426950408889634,  # log2(e): the kernels work in base 2
            HEADS=shape.heads,
            QUERY_LEN=shape.query_len,
            ROPE=shape.rope_dim,
            PAGE=shape.page_size,
            ROW_BYTES=shape.cache_dim,
            S0=s0,
            S1=s1,
            O0=o0,
            O1=o1,
            S0_BLOCK=_padded(s0),
            S1_BLOCK=_padded(s1),
            O0_BLOCK=_padded(o0),
            O1_BLOCK=_padded(o1),
            ROPE_BLOCK=_padded(shape.rope_dim),
            ROWS=tiling.rows,
            BLOCK_N=tiling.tokens,
            COMPUTE=getattr(triton.language, tiling.compute) if cache.is_cuda else triton.language.float32,
            KEYS=triton.language.bfloat16 if cache.is_cuda else triton.language.float32,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        kernels.fp8_merge_kernel[(self._rows, batch)](
            self._partial_out,
            self._partial_lse,
            lengths,
            out,
            *out.stride()[:2],
            batch,
            self._row_blocks,
            splits,
            self._target,
            HEADS=shape.heads,
            QUERY_LEN=shape.query_len,
            W=w,
            W_BLOCK=triton.next_power_of_2(w),
            BLOCK_N=tiling.tokens,
            num_warps=4,
        )
        return out
